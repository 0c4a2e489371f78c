"""On a mesh of eight devices; run by test_plan_collectives in a process of its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jpeft
from jpeft.hf._load import model_sites, parameter_shapes
from jpeft.hf.architectures import ARCHITECTURES
from jpeft.plan import Collective, collectives
from jpeft.plan import _plan as planned
from jpeft.plan._step import abstract_step


FIELDS = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
ALL = jax.sharding.Mesh(np.array(jax.devices()), ("x",))


def sent(fn, spec, out, *shapes):
    mapped = jax.shard_map(fn, mesh=ALL, in_specs=spec, out_specs=out, check_vma=False)
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return collectives(jax.jit(mapped).lower(*args).compile().as_text())


def test_each_kind_has_the_size_of_the_whole_array():
    assert sent(lambda x: jax.lax.all_gather(x, "x"), P("x"), P(), (8, 5)) == [Collective("all-gather", "f32", 1, 160)]
    assert sent(lambda x: jax.lax.psum(x, "x"), P("x"), P(), (8, 5)) == [Collective("all-reduce", "f32", 1, 20)]
    scatter = functools.partial(jax.lax.psum_scatter, axis_name="x", tiled=True)
    assert sent(scatter, P(), P("x"), (16, 5)) == [Collective("reduce-scatter", "f32", 1, 320)]
    turn = functools.partial(jax.lax.ppermute, axis_name="x", perm=[(n, (n + 1) % 8) for n in range(8)])
    assert sent(turn, P("x"), P("x"), (8, 5)) == [Collective("collective-permute", "f32", 1, 20)]


def test_every_turn_of_a_loop_counts():
    def loop(x):
        return jax.lax.scan(lambda c, y: (jnp.sin(jax.lax.psum(c + y, "x")), None), x[0], x)[0]

    assert sent(loop, P(), P(), (7, 5)) == [Collective("all-reduce", "f32", 7, 7 * 20)]


def step(base, **sizes):
    architecture = ARCHITECTURES["llama"]
    model = architecture.build(FIELDS, scan=True, remat="full")
    shapes = parameter_shapes(architecture, model)
    sites = model_sites(architecture, model, shapes)
    adapter = jpeft.lora(rank=2, sites=sites)
    how = jpeft.chain(jpeft.nf4(sites=sites, block=16), adapter) if base == "nf4" else adapter
    shape = tuple(sizes.get(axis, 1) for axis in planned.AXES)
    mesh = Mesh(np.array(jax.devices()).reshape(shape), planned.AXES)
    options = {"batch_size": 8, "length": 16, "adapter_sharding": "tensor"}
    return abstract_step(model, unflatten_dict(shapes, sep="/"), how, mesh, **options)


def compiled(base, **sizes):
    with jax.numpy_dtype_promotion("standard"):  # Optax counts steps in integers
        return planned._compile(step(base, **sizes))


@pytest.mark.parametrize("base", ["float", "nf4"])
def test_data_parallel_training_sends_gradients_of_the_adapter_and_the_loss(base):
    memory, available, calls = compiled(base, data=8)
    rank, layers, kernels = 2, 3, 4 * (64 + 64) + 3 * (64 + 128)
    assert memory.adapters == 4 * layers * rank * kernels
    assert memory.optimizer == 2 * memory.adapters + 4
    assert available is None and memory.layout == 0
    assert [(x.kind, x.dtype, x.bytes) for x in calls] == [("all-reduce", "f32", memory.adapters + 4)]


def test_the_base_is_divided_and_gathered_as_codes():
    memory, _, calls = compiled("nf4", data=4, fsdp=2)
    gathered = {x.dtype: x.bytes for x in calls if x.kind == "all-gather"}
    codes = 3 * (4 * 64 * 64 + 3 * 64 * 128) // 2
    constants = 2 * codes // 16  # a byte for every 16 weights
    assert gathered["u8"] == 2 * (codes + constants)  # forward and backward
    assert [x.bytes for x in calls if x.kind == "all-reduce"] == [memory.adapters + 4]
