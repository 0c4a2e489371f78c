"""The summary counts what there is: numbers, bytes, and what an optimizer keeps."""

import jax
import jax.numpy as jnp
import optax
import pytest

import jpeft
from jpeft._summary import Row, human, summary


def base(layers=3, experts=0, dtype=jnp.float32):
    tree = {"head": {"kernel": jnp.ones((8, 2), dtype), "bias": jnp.ones(2, dtype)}}
    for i in range(layers):
        tree[f"layers_{i}"] = {"kernel": jnp.ones((8, 8), dtype), "bias": jnp.ones(8, dtype)}
        for e in range(experts):
            tree[f"layers_{i}"][f"expert_{e}"] = {"kernel": jnp.ones((8, 8), dtype)}
    return tree


def size(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def test_rows():
    rows = {row.path: row for row in summary(jpeft.lora(base(), rank=2)).rows}
    assert rows["layers_1/kernel"] == Row("layers_1/kernel", "LoRA", (8, 8), 32, 64 + 32, 32 * 4, 64 * 4)
    assert rows["layers_1/bias"] == Row("layers_1/bias", "array", (8,), 0, 8, 0, 32)
    modules = ("head", "layers_0", "layers_1", "layers_2")
    assert list(rows) == [f"{module}/{name}" for module in modules for name in ("bias", "kernel")]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("method", "trainable", "added"),
    [
        (jpeft.lora(rank=2), 3 * 32, 3 * 32),
        (jpeft.chain(jpeft.lora(rank=2), jpeft.lora(rank=1)), 3 * 48, 3 * 48),
        (jpeft.bitfit(), 3 * 8 + 2, 0),
        (jpeft.last_layers(k=1), 8 * 8 + 8, 0),
        (jpeft.bottleneck(width=2, targets="layers_.*"), 3 * (16 + 2 + 16 + 8), 3 * (16 + 2 + 16 + 8)),
        (jpeft.chain(jpeft.nf4(), jpeft.lora(rank=2), jpeft.bitfit()), 3 * 32 + 3 * 8 + 2, 3 * 32),
    ],
    ids=["lora", "nested", "bitfit", "layers", "bottleneck", "qlora"],
)
def test_totals(method, trainable, added, dtype):
    params = method(base(dtype=dtype))
    found = summary(params, optax.adam(1e-3))
    trains, frozen = jpeft.partition(params)
    assert trainable == found.trainable == sum(x.size for x in jax.tree.leaves(trains))
    assert found.total == sum(x.size for x in jax.tree.leaves(base())) + added
    assert found.percent == 100 * trainable / found.total
    assert found.weight_bytes == size(params)
    assert found.gradient_bytes == size(trains)
    assert sum(row.frozen_bytes for row in found.rows) == size(frozen)
    assert found.optimizer_bytes == size(optax.adam(1e-3).init(trains))


def test_stacked_quantized_and_partly_trained():
    params = {"layers": {"kernel": jnp.ones((4, 130, 8)), "bias": jnp.ones((4, 8))}}  # rows fill up the last group
    quantized = jpeft.int4(params, targets={".*kernel": "sio"})
    (bias, kernel) = summary(jpeft.last_layers(quantized, k=1, pattern="(?P<stack>layers)/bias")).rows
    assert (bias.kind, bias.shape, bias.trainable, bias.total) == ("Rows", (4, 8), 8, 32)
    assert (kernel.kind, kernel.shape, kernel.trainable, kernel.total) == ("Int4", (4, 130, 8), 0, 4 * 130 * 8)
    assert kernel.frozen_bytes == size(quantized["layers"]["kernel"]) < 4 * 130 * 8


def test_abstract_trees_need_no_memory():
    huge = {"layers": {"kernel": jax.ShapeDtypeStruct((80, 8192, 28672), jnp.bfloat16)}}
    tune = jpeft.chain(jpeft.nf4(targets={".*": "sio"}), jpeft.lora(rank=16, targets={".*": "sio"}))
    found = summary(jax.eval_shape(tune, huge), optax.adamw(1e-4))
    assert found.trainable == 80 * 16 * (8192 + 28672)
    assert found.total == 80 * 8192 * 28672 + found.trainable
    assert found.optimizer_bytes == 2 * found.gradient_bytes + 4 == 2 * 4 * found.trainable + 4
    weights = found.weight_bytes - found.gradient_bytes
    assert 4.12 < 8 * weights / (80 * 8192 * 28672) < 4.13


def test_abstract_equals_real():
    tune = jpeft.chain(jpeft.int8(), jpeft.lora(rank=2))
    assert summary(jax.eval_shape(tune, base()), optax.sgd(1)) == summary(tune(base()), optax.sgd(1))


def test_other_leaves():
    """Numbers that are no arrays, 4-bit integers, keys in the optimizer's state, arrays of no size."""
    params = {"a": 2.0, "b": jnp.ones(3, jnp.int4), "c": jpeft.Free(array=jnp.ones((2, 0)))}
    found = summary(params, optax.add_noise(1.0, 0.5, jax.random.key(0)))
    assert (found.total, found.trainable, found.weight_bytes) == (4, 0, 4 + 2)
    assert found.optimizer_bytes == 4 + 8
    assert summary(base()).percent == summary({}).percent == 0


def test_grouped():
    params = jpeft.lora(base(layers=12, experts=2), rank={"layers_1.*": 4, ".*expert_1.*": 4, ".*": 2})
    found = {row.path: (row.count, row.trainable) for row in summary(params).grouped()}
    assert found == {
        "head/bias": (1, 0),
        "head/kernel": (1, 0),
        "layers_{0..11}/bias": (12, 0),
        "layers_{0,2..9}/kernel": (9, 9 * 32),
        "layers_{1,10..11}/kernel": (3, 3 * 64),
        "layers_{0,2..9}/expert_0/kernel": (9, 9 * 32),
        "layers_{0,2..9}/expert_1/kernel": (9, 9 * 64),
        "layers_{1,10..11}/expert_{0..1}/kernel": (6, 6 * 64),
    }
    for field in ("trainable", "total", "trainable_bytes", "frozen_bytes", "count"):
        whole = summary(params)
        assert sum(getattr(r, field) for r in whole.grouped()) == sum(getattr(r, field) for r in whole.rows)


def test_text():
    text = str(summary(jpeft.chain(jpeft.int8(), jpeft.lora(rank=2))(base()), optax.adam(1e-3)))
    assert text == """\
parameter                 node        shape   trainable  total  memory
----------------------------------------------------------------------
head/bias                 array       (2,)            -      2     8 B
head/kernel               array       (8, 2)          -     16    64 B
layers_{0..2}/bias  x3    array       (8,)            -     24    96 B
layers_{0..2}/kernel  x3  LoRA(Int8)  (8, 8)         96    288   672 B
----------------------------------------------------------------------
total                                                96    330   840 B

96 of 330 parameters train (29.1%)
memory: weights 840 B, gradients 384 B, optimizer 772 B"""
    assert "optimizer" not in str(summary(base()))


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1.5 * 2**20, "1.5 MiB"), (2**50, "1024.0 TiB")]
)
def test_human(n, text):
    assert human(n) == text
