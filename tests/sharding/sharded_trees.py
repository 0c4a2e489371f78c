"""How the arrays of nodes are divided: `test_sharding.py` runs this file in a process with eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jpeft
from jpeft import models


MESH = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
AXES = {"layers/.*kernel": "sio", "query/kernel": "ioo", "out/kernel": "ooi", "down/kernel": "io"}
SPECS = {
    "down": {"kernel": P("tensor", "fsdp")},
    "layers": {"up": {"kernel": P(None, "fsdp", "tensor")}},
    "out": {"kernel": P("tensor", None, "fsdp")},
    "query": {"kernel": P("fsdp", "tensor")},
    "norm": {"scale": P()},
}
BASE = {
    "down": {"kernel": (64, 32)},
    "layers": {"up": {"kernel": (3, 32, 64)}},
    "out": {"kernel": (4, 8, 32)},
    "query": {"kernel": (32, 4, 8)},
    "norm": {"scale": (32,)},
}
is_shape = lambda x: isinstance(x, tuple)
BASE = jax.tree.map(lambda n: jax.random.normal(jax.random.key(sum(n)), n), BASE, is_leaf=is_shape)
PLACED = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(MESH, spec)), BASE, SPECS)


def specs(tree):
    """`{path: entries}`, without the `None`s at the end."""

    def entries(x):
        spec = [*(x if isinstance(x, NamedSharding) else x.sharding).spec]
        while spec and spec[-1] is None:
            spec.pop()
        return tuple(spec)

    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, NamedSharding))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): entries(x) for path, x in leaves}


def test_factors_are_divided_as_inputs_and_outputs():
    tuned = jpeft.lora(BASE, rank=4, targets=AXES)
    found = specs(jpeft.shardings(tuned, SPECS, mesh=MESH))
    assert found["down/kernel/base"] == ("tensor", "fsdp")
    assert found["down/kernel/a"] == ("tensor",) and found["down/kernel/b"] == ()
    assert found["layers/up/kernel/a"] == () and found["layers/up/kernel/b"] == (None, None, "tensor")
    assert found["query/kernel/a"] == () and found["query/kernel/b"] == (None, "tensor")
    assert found["out/kernel/a"] == () and found["out/kernel/b"] == (None, "tensor")
    assert found["norm/scale"] == ()

    found = specs(jpeft.shardings(tuned, SPECS, mesh=MESH, adapter_sharding="inherit"))
    assert found["down/kernel/a"] == ("tensor",) and found["down/kernel/b"] == (None, "fsdp")
    assert found["layers/up/kernel/a"] == (None, "fsdp") and found["out/kernel/a"] == ("fsdp",)
    assert specs(jpeft.shardings(tuned, SPECS, mesh=MESH, data_axes=("tensor",)))["down/kernel/b"] == (None, "fsdp")


def test_codes_and_constants_are_divided_together():
    tuned = jpeft.lora(jpeft.nf4(BASE, block=16, targets=AXES), rank=4, targets=AXES)
    found = specs(jpeft.shardings(tuned, SPECS, mesh=MESH))
    for name, spec in (("down", ("tensor", "fsdp")), ("query", ("fsdp", "tensor"))):
        assert found[f"{name}/kernel/base/codes"] == found[f"{name}/kernel/base/absmax"] == spec
        assert found[f"{name}/kernel/base/mean"] == ()
    assert found["layers/up/kernel/base/codes"] == (None, "fsdp", "tensor")


def test_no_group_is_cut():
    wide = jpeft.nf4(BASE, targets=AXES)  # 64 weights a group
    with pytest.raises(ValueError, match=r"(?s)down/kernel, NF4: its 64 inputs are in 1 groups.*query/kernel, NF4"):
        jpeft.shardings(wide, SPECS, mesh=MESH)
    with pytest.raises(ValueError, match="down/kernel: its 64 inputs are in 1 groups"):
        jpeft.nf4(PLACED, targets=AXES)
    whole = specs(jpeft.shardings(jpeft.int8(BASE, targets=AXES), SPECS, mesh=MESH))  # a code a byte, one constant
    assert whole["down/kernel/codes"] == ("tensor", "fsdp") and whole["down/kernel/scale"] == (None, "fsdp")


def test_what_is_of_the_size_of_a_kernel_is_divided_as_it():
    for make, array in ((jpeft.delta(targets=AXES), "values"), (jpeft.unfreeze(targets=list(AXES)), "array")):
        tuned = make(BASE)
        found = specs(jpeft.shardings(tuned, SPECS, mesh=MESH))
        assert found[f"down/kernel/{array}"] == ("tensor", "fsdp")


def test_shared_arrays_and_nodes_beside_modules():
    tuned = jpeft.vera(BASE, rank=4, targets=AXES)
    found = specs(jpeft.shardings(tuned, SPECS, mesh=MESH))
    assert {path: spec for path, spec in found.items() if path.startswith("jpeft_shared")} == {
        "jpeft_shared/vera_a": (), "jpeft_shared/vera_b": ()}  # fmt: skip
    beside = jpeft.bottleneck(BASE, width=4, targets="down")
    found = specs(jpeft.shardings(beside, SPECS, mesh=MESH))
    assert {spec for path, spec in found.items() if "bottleneck" in path} == {()}


@pytest.mark.parametrize("make", [jpeft.lora(rank=4), jpeft.pissa(rank=4), jpeft.nf4(block=16), jpeft.dora(rank=4)])
def test_transforms_put_what_they_make_where_its_base_is(make):
    expected, found = make(BASE, targets=AXES), make(PLACED, targets=AXES)
    assert specs(found) == specs(jpeft.shardings(expected, SPECS, mesh=MESH))
    for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(np.float32(x), np.float32(y), atol=1e-6)


def test_arrays_of_their_own_shardings():
    """Of a placed tree, and of shapes on a mesh."""
    tuned = jpeft.lora(PLACED, rank=4, targets=AXES)
    assert specs(jpeft.shardings(tuned)) == specs(tuned)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tuned)
    assert specs(jpeft.shardings(shapes)) == specs(tuned)
    with pytest.raises(ValueError, match="5 parameters have no `NamedSharding`: down/kernel"):
        jpeft.shardings(jpeft.lora(BASE, rank=4, targets=AXES))


def test_shard():
    """The arrays are new ones: to donate them leaves those of the caller."""
    tuned = jpeft.lora(jpeft.nf4(BASE, block=16, targets=AXES), rank=4, targets=AXES)
    to = jpeft.shardings(tuned, SPECS, mesh=MESH)
    placed = jpeft.shard(tuned, to)
    assert specs(placed) == specs(to)
    jax.jit(lambda x: jax.tree.map(lambda a: a + 1, x), donate_argnums=0)(placed)
    assert not any(x.is_deleted() for x in jax.tree.leaves(tuned))
    shapes = jpeft.shard(jax.eval_shape(lambda: tuned), to)
    assert specs(shapes) == specs(to) and all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(shapes))


def test_devices_are_not_saved(tmp_path):
    """A base on a mesh is the base of a checkpoint that was made on one device, and the reverse."""
    one = jpeft.lora(jpeft.nf4(BASE, block=16, double=False, targets=AXES), rank=4, targets=AXES)
    many = jpeft.shard(one, jpeft.shardings(one, SPECS, mesh=MESH))
    assert many["down"]["kernel"].base.gathered is not None
    for n, (saved, base) in enumerate([(one, many), (many, one)]):
        jpeft.save(tmp_path / str(n), saved)
        restored = jpeft.restore(tmp_path / str(n), base)
        for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True):
            assert x.dtype == y.dtype and np.array_equal(x, y)


def test_rules_of_logical_axes():
    boxed = lambda x, *names: nn.LogicallyPartitioned(x, names)
    params = {"up": {"kernel": boxed(jnp.ones((8, 16)), "embed", "mlp")}, "scale": boxed(jnp.ones(8), "embed")}
    tuned = jpeft.lora(params, rank=2, targets="up/kernel")
    found = specs(jpeft.shardings(tuned, mesh=MESH, rules=[("embed", "fsdp"), ("mlp", "tensor")]))
    assert found["up/kernel/base/value"] == ("fsdp", "tensor") and found["scale/value"] == ("fsdp",)
    assert found["up/kernel/a"] == () and found["up/kernel/b"] == (None, "tensor")


def test_hidden_states_are_divided_along_the_batch():
    with jax.set_mesh(MESH):
        found = jax.jit(models._sharding.along_batch)(jnp.ones((8, 3, 4)))
        uneven = jax.jit(models._sharding.along_batch)(jnp.ones((6, 3, 4)))
    assert found.sharding.spec == P(("data", "fsdp")) and uneven.sharding.is_fully_replicated


def test_a_mesh_of_one_device():
    one = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), MESH.axis_names)
    placed = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(one, spec)), BASE, SPECS)
    tuned = jpeft.lora(jpeft.nf4(placed, targets=AXES), rank=4, targets=AXES)
    moved = jpeft.shard(tuned, jpeft.shardings(tuned, SPECS, mesh=one))
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(tuned), jax.tree.leaves(moved), strict=True))
