"""What a step moves between devices: `test_sharding.py` runs this file in a process with eight devices."""

import collections
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from collectives import collectives, size
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jpeft
from jpeft import models
from jpeft.models import _loss


CONFIG = models.DecoderConfig(
    vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=8, head_dim=16,
)  # fmt: skip
IDS = jnp.arange(8 * 16).reshape(8, 16) % 256
MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8), "fsdp tensor": (1, 4, 2), "all": (2, 2, 2)}
RANK, BLOCK = 8, 16


@functools.cache
def base(scan):
    model = models.Decoder(CONFIG, scan=scan)
    params = model.init(jax.random.key(0), IDS)["params"]
    return model, params, jpeft.sites(model, {"params": params}, IDS)


def mesh_of(name):
    return Mesh(np.array(jax.devices()).reshape(MESHES[name]), ("data", "fsdp", "tensor"))


def compiled(mesh, run, trainable, frozen):
    """A step of gradient descent: `run(trainable, frozen, ids)` are logits."""

    def step(trainable, frozen, ids):
        def loss(trainable):
            logits = run(trainable, frozen, ids)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]))

        value, grads = jax.value_and_grad(loss)(trainable)
        return value, jax.tree.map(lambda x, g: x - 0.1 * g, trainable, grads)

    whole = NamedSharding(mesh, P())
    out = whole, jax.tree.map(lambda x: x.sharding, trainable)
    ids = jax.device_put(IDS, NamedSharding(mesh, P(("data", "fsdp"))))
    with jax.set_mesh(mesh):
        return jax.jit(step, out_shardings=out).lower(trainable, frozen, ids).compile()


@functools.cache
def moved(name, scan, quantized, adapter_sharding="tensor"):
    """`(collectives, bytes of all adapters)` of a step with LoRA."""
    mesh, (model, params, sites) = mesh_of(name), base(scan)
    tuned = jpeft.nf4(params, block=BLOCK, sites=sites) if quantized else params
    tuned = jpeft.lora(tuned, rank=RANK, sites=sites)
    to = jpeft.shardings(tuned, models.shardings(params, mesh), adapter_sharding=adapter_sharding)
    trainable, frozen = jpeft.partition(jpeft.shard(tuned, to))
    run = lambda trainable, frozen, ids: jpeft.apply(model, {"params": jpeft.combine(trainable, frozen)}, ids)
    return collectives(compiled(mesh, run, trainable, frozen)), sum(x.nbytes for x in jax.tree.leaves(trainable))


def by_hand(name):
    """The collectives of a step whose LoRA an interceptor of the unrolled model adds to every projection in a layer."""
    mesh, (model, params, _) = mesh_of(name), base(False)
    places = models.shardings(params, mesh)
    factors, specs = {}, {}
    for path, kernel in jax.tree_util.tree_leaves_with_path(params):
        keys = tuple(k.key for k in path)
        if keys[0].startswith("layers") and keys[-1] == "kernel":
            i, o = (*functools.reduce(lambda tree, k: tree[k], keys, places).spec, None, None)[:2]
            keep = lambda axis: axis if axis == "tensor" else None
            factors[keys[:-1]] = {"a": jnp.ones((kernel.shape[0], RANK)), "b": jnp.ones((RANK, kernel.shape[1]))}
            specs[keys[:-1]] = {"a": P(keep(i), None), "b": P(None, keep(o))}
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))

    def run(factors, params, ids):
        def add(call, args, kwargs, context):
            y = call(*args, **kwargs)
            own = factors.get(context.module.path)
            return y if own is None or context.method_name != "__call__" else y + args[0] @ own["a"] @ own["b"]

        with nn.intercept_methods(add):
            return model.apply({"params": params}, ids)

    trainable = {path: jax.tree.map(put, own, specs[path]) for path, own in factors.items()}
    return collectives(compiled(mesh, run, trainable, jax.tree.map(jax.device_put, params, places)))


@pytest.mark.parametrize("name", MESHES)
def test_no_collective_that_a_step_by_hand_does_not_have(name):
    assert moved(name, False, False)[0] == by_hand(name)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", ["data", "fsdp"])
def test_gradients_move_the_adapters_alone(name, scan, quantized):
    """And the loss. In a scan those of one layer, in every trip."""
    found, adapters = moved(name, scan, quantized)
    assert size(found["all-reduce"]) == adapters // (CONFIG.num_hidden_layers if scan else 1) + 4
    assert "reduce-scatter" not in found


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("scan", [False, True])
def test_model_parallel_factors_are_never_gathered(scan, quantized):
    found, _ = moved("tensor", scan, quantized)
    assert found.keys() == {"all-reduce"}
    activations = {"f32[8,16,8]", "f32[8,16,128]", "f32[8,15]", "f32[8,15,1]"}
    assert found["all-reduce"].keys() <= activations


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", ["fsdp", "fsdp tensor", "all"])
def test_codes_are_gathered_and_not_what_they_stand_for(name, scan):
    """Of floating-point arrays only those that are not quantized: the embeddings and the head."""
    found, _ = moved(name, scan, True)
    matrices = lambda found, dtype: {
        shape: n for shape, n in found["all-gather"].items() if shape.startswith(dtype) and shape.count(",") > 0
    }
    codes, floats = matrices(found, "u8"), matrices(found, "f32")
    d, v, parts = CONFIG.hidden_size, CONFIG.vocab_size, MESHES[name][2]
    kept = {f"f32[{v},{d}]", f"f32[{d},{v}]", f"f32[{v // parts},{d}]", f"f32[{d},{v // parts}]"}
    kept |= {shape for shape in floats if len(shape.split(",")) == 3}  # activations, of the lookup
    assert floats.keys() <= kept
    # For the forward product and the backward one, but for those of the first layer that nothing is behind.
    mesh, (_, params, sites) = mesh_of(name), base(scan)
    quantized = jpeft.nf4(params, block=BLOCK, sites=sites)
    placed = jpeft.shard(quantized, jpeft.shardings(quantized, models.shardings(params, mesh)))
    local = [x.addressable_shards[0].data for x in jax.tree.leaves(placed) if x.dtype == jnp.uint8]
    once = sum(x.nbytes for x in local) * MESHES[name][1] // (CONFIG.num_hidden_layers if scan else 1)
    assert once < size(codes) <= 2 * once


@pytest.mark.parametrize("name", ["fsdp", "fsdp tensor", "all"])
def test_inherit_gathers_adapters(name):
    """So the other sharding is the default."""
    default, inherit = (moved(name, False, False, how)[0] for how in ("tensor", "inherit"))
    of_adapters = lambda found: collections.Counter(
        {s: n for s, n in (found["all-gather"] + found.get("collective-permute", collections.Counter())).items()
         if s in ("f32[128,8]", "f32[8,128]", "f32[64,8]", "f32[8,64]")}
    )  # fmt: skip
    assert not of_adapters(default) and of_adapters(inherit)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", MESHES)
def test_the_head_is_gathered_once(name, tied, monkeypatch):
    """And not for each of the parts of the sequence whose logits are formed at once; the loss is that of one device."""
    monkeypatch.setattr(_loss, "LOGITS", 4 * CONFIG.vocab_size)  # of four tokens of a row
    model = models.Decoder(dataclasses.replace(CONFIG, tie_word_embeddings=tied), scan=True)
    params = model.init(jax.random.key(0), IDS)["params"]
    how = {"targets": "layers/.*", "sites": jpeft.sites(model, {"params": params}, IDS)}
    tuned = jpeft.lora(jpeft.nf4(params, block=BLOCK, **how), rank=RANK, **how)
    mesh = mesh_of(name)
    trainable, frozen = jpeft.partition(jpeft.shard(tuned, jpeft.shardings(tuned, models.shardings(params, mesh))))

    def loss(trainable, frozen, ids):
        return jpeft.apply(model, {"params": jpeft.combine(trainable, frozen)}, ids, labels=ids).mean()

    expected = jax.value_and_grad(loss)(*jpeft.partition(tuned), IDS)
    with jax.set_mesh(mesh):
        ids = jax.device_put(IDS, NamedSharding(mesh, P(("data", "fsdp"))))
        compiled = jax.jit(jax.value_and_grad(loss)).lower(trainable, frozen, ids).compile()
    for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(compiled(trainable, frozen, ids)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * np.abs(x).max())
    d, words = CONFIG.hidden_size, CONFIG.vocab_size // MESHES[name][2]
    table, head = f"f32[{words},{d}]", f"f32[{d},{words}]"  # here and there of one shape
    gathered = collectives(compiled).get("all-gather", collections.Counter())
    lookup = tied or table == head
    assert gathered[table if tied else head] <= (1 + lookup if MESHES[name][1] > 1 else 0)
