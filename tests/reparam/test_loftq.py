"""LoftQ: its turns by hand, how near its start is, and what PEFT makes of the scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft._lazy import Lazy


W = jax.random.normal(jax.random.key(0), (16, 12))
QUANTIZERS = {"nf4": jpeft.nf4(block=8), "int8": jpeft.int8(), "int4": jpeft.int4(group=8)}


def loftq(w=W, targets="w", quantize="nf4", **how):
    how = {"quantize": QUANTIZERS[quantize], "targets": targets, "rank": 2} | how
    return jpeft.quantize_with_adapter({"w": w}, **how)["w"]


def distance(x, w=W):
    return float(np.linalg.norm(np.asarray(x, np.float64) - np.asarray(w)))


def part(m, rank):
    u, s, v = np.linalg.svd(m, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


@pytest.mark.parametrize("quantize", QUANTIZERS)
@pytest.mark.parametrize("alpha", [None, 6])
def test_turns_by_hand(quantize, alpha):
    """Codes are those of what the term leaves, and the term is the part of what the codes leave."""
    term = np.zeros(W.shape, np.float32)
    for steps in (1, 2, 3):
        codes = QUANTIZERS[quantize]({"w": jnp.asarray(W - term)}, targets="w")["w"].value()
        term = part(np.asarray(W - codes), 2)
        node = loftq(quantize=quantize, alpha=alpha, steps=steps)
        assert isinstance(node, jpeft.LoRA) and node.scale == (alpha or 2) / 2
        np.testing.assert_allclose(node.scale * node.a @ node.b, term, atol=1e-4)
        np.testing.assert_allclose(node.base.value(), codes, atol=1e-4)
        np.testing.assert_allclose(node.a.T @ node.a, node.b @ node.b.T, atol=1e-4)  # the roots of singular values


def test_is_nearer_than_codes_alone():
    """From turn to turn, and nearer the higher the rank."""
    plain = distance(QUANTIZERS["nf4"]({"w": W}, targets="w")["w"].value())
    errors = [distance(loftq(steps=n).value()) for n in (1, 2, 4)]
    assert plain > 1.05 * errors[0] and errors[0] > errors[1] > errors[2]
    assert distance(loftq(steps=1, rank=6).value()) < 0.8 * errors[0]


def test_full_rank_is_exact():
    np.testing.assert_allclose(loftq(rank=12, alpha=3, steps=1).value(), W, atol=1e-5)


def test_peft_leaves_the_scale_out():
    """Its factors are those of s = 1, whatever is made of them then."""
    theirs, ours, one = loftq(alpha=8, scaled=False), loftq(alpha=8), loftq()
    np.testing.assert_array_equal(theirs.a, one.a)
    np.testing.assert_array_equal(theirs.b, one.b)
    assert theirs.scale == 4
    np.testing.assert_allclose(ours.value(), one.value(), atol=1e-5)
    assert distance(theirs.value()) > 1.5 * distance(ours.value())


def test_of_stacked_kernels_and_half_precision():
    w = jax.random.normal(jax.random.key(1), (3, 16, 12)).astype(jnp.bfloat16)
    node = loftq(w, {"w": "sio"}, steps=2)
    assert node.axes == "sio" and node.value().dtype == jnp.bfloat16 and node.a.dtype == jnp.float32
    for n in range(3):
        np.testing.assert_allclose(node.a[n] @ node.b[n], loftq(w[n], steps=2).a @ loftq(w[n], steps=2).b, atol=1e-4)
    exact = w.astype(jnp.float32)
    coded = QUANTIZERS["nf4"]({"w": w}, targets={"w": "sio"})["w"]
    assert distance(node.exact(), exact) < 0.9 * distance(coded.value().astype(jnp.float32), exact)


def test_of_kernels_of_many_axes_in_a_model():
    """Targets and options are those of names; other parameters stay."""
    params = {"q": {"kernel": W.reshape(16, 3, 4)}, "o": {"kernel": W}, "norm": {"scale": jnp.ones(3)}}
    targets = {"q/kernel": "ioo", "o/kernel": "io"}
    tuned = jpeft.quantize_with_adapter(
        params, quantize=jpeft.int4(group=8), rank={"q.*": 1, ".*": 3}, targets=targets, steps=2
    )
    assert tuned["q"]["kernel"].value().shape == (16, 3, 4) and tuned["norm"] == params["norm"]
    assert tuned["q"]["kernel"].a.shape == (16, 1) and tuned["o"]["kernel"].a.shape == (16, 3)
    assert isinstance(tuned["q"]["kernel"].base, jpeft.Int4)
    alone = loftq(quantize="int4", rank=1, steps=2)
    np.testing.assert_allclose(tuned["q"]["kernel"].value().reshape(16, 12), alone.value(), atol=1e-6)


def test_is_restored_onto_its_codes(tmp_path):
    """They are none that the kernels by themselves have, and are made again in the same way."""
    make = jpeft.quantize_with_adapter(quantize=QUANTIZERS["nf4"], rank=2, targets="w")
    tuned = make({"w": W})
    tuned = {"w": tuned["w"].replace(b=tuned["w"].b + 1)}
    jpeft.save(tmp_path / "adapter", tuned)
    back = jpeft.restore(tmp_path / "adapter", jpeft.strip(make({"w": W})))
    np.testing.assert_array_equal(back["w"].value(), tuned["w"].value())
    with pytest.raises(jpeft.BaseMismatchError):
        jpeft.restore(tmp_path / "adapter", QUANTIZERS["nf4"]({"w": W}, targets="w"))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"steps": 0}, "at least one step, not 0"),
        ({"rank": 13}, r"'w' has matrices of \(16, 12\): what is rounded away has no rank=13"),
        ({"rank": 0}, "rank of at least 1"),
        ({"dropout": 1.0}, r"dropout in \[0, 1\)"),
    ],
)
def test_refuses(how, message):
    with pytest.raises(ValueError, match=message):
        loftq(**how)


@pytest.mark.parametrize("quantize", [jpeft.chain(jpeft.nf4()), jpeft.nf4(targets="w")])
def test_refuses_transforms_that_would_not_follow_its_targets(quantize):
    with pytest.raises(ValueError, match="one transform without targets"):
        jpeft.quantize_with_adapter({"w": W}, quantize=quantize, targets="w")


def test_refuses_what_is_quantized_already():
    with pytest.raises(ValueError, match="w: NF4"):
        jpeft.quantize_with_adapter(QUANTIZERS["nf4"]({"w": W}, targets="w"), quantize=jpeft.nf4(), targets="w")


def many(seed=0):
    shapes = {"first": (8, 12), "second": (16, 12), "third": (12, 8)}
    return {n: jax.random.normal(jax.random.key(seed + i), s) for i, (n, s) in enumerate(shapes.items())}


def quantized(params, **how):
    how = {"quantize": QUANTIZERS["nf4"], "targets": ".*", "rank": 2, "steps": 2} | how
    return jpeft.quantize_with_adapter(params, **how)


def test_goes_on_where_it_was_interrupted(tmp_path):
    """Bitwise the same, and no kernel that was done is quantized again."""
    done = []

    def until(last):
        def quantize(params, *, targets=None, key=None):
            (name,) = params
            if not isinstance(params[name], jax.core.Tracer):
                if name == last:
                    raise KeyboardInterrupt
                done.append(name)
            return QUANTIZERS["nf4"](params, targets=targets, key=key)

        return quantize

    expected = quantized(many())
    with pytest.raises(KeyboardInterrupt):
        quantized(many(), quantize=until("third"), resume=tmp_path / "pass", save_every=1)
    assert done == ["first"] * 2 + ["second"] * 2
    done.clear()
    found = quantized(many(), quantize=until(None), resume=tmp_path / "pass", save_every=1)
    assert done == ["third"] * 2
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert all(np.abs(x.b).max() > 0 for x in found.values())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"steps": 3}, "other options: steps"),
        ({"alpha": 4}, r"other results: \['first'\], \['second'\], \['third'\]"),
        ({"quantize": QUANTIZERS["int8"]}, "other results"),
        ({"params": many(seed=9)}, r"other parameters: \['first'\]"),
    ],
)
def test_refuses_to_go_on_with_another_pass(tmp_path, how, message):
    quantized(many(), resume=tmp_path / "pass")
    with pytest.raises(ValueError, match=message):
        quantized(**({"params": many()} | how), resume=tmp_path / "pass")


def test_of_kernels_that_are_still_in_a_file(tmp_path):
    reads = []
    lazy = lambda n, x: Lazy(x.shape, x.dtype, lambda _: reads.append(n) or x)
    found = quantized({n: lazy(n, x) for n, x in many().items()})
    assert reads == list(many())
    resumed = quantized({n: lazy(n, x) for n, x in many().items()}, resume=tmp_path / "pass")
    for tree in (found, resumed):
        jax.tree.map(np.testing.assert_array_equal, tree, quantized(many()))
