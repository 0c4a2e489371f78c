"""On a mesh of eight devices; run by test_load in a process of its own."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from test_load import AXES, UNROLLED, same
from tiny import random_tensors

import jpeft
from jpeft.hf import load
from jpeft.models import logical_axes, shardings


NAMES = ("expert", "fsdp", "tensor")


@pytest.fixture
def mesh():
    return Mesh(np.array(jax.devices()).reshape(2, 2, 2), NAMES)


def specs(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x.sharding.spec for path, x in leaves}


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_parameters_are_divided_while_they_are_read(directory, mesh, scan, quantized):
    path = directory(random_tensors())
    # Not `double`: its mean depends on the order of the sum.
    # Not `double`: its mean depends on the order of the sum.
    quantize = jpeft.nf4(targets=AXES if scan else UNROLLED, block=4, double=False) if quantized else None
    options = {"scan": scan, "quantize": quantize}
    params = load(path, mesh=mesh, **options)[1]
    same(params, load(path, **options)[1])
    found = specs(params)
    layer, over = ("layers", (None,)) if scan else ("layers_0", ())
    assert found["embed/embedding"] == P("tensor", "fsdp")
    assert found[f"{layer}/qkv/bias"] == P(*over, "tensor")
    at = "/codes" if quantized else ""
    assert found[f"{layer}/qkv/kernel{at}"] == P(*over, "fsdp", "tensor")


def test_experts_are_divided(directory, mesh):
    path = directory(random_tensors())
    axes = {"embed": "fsdp", "mlp": "tensor", "experts": "expert"}
    rules = {"layers/experts/gate_up": (None, "experts", "embed", "mlp"), "layers/moe/experts/down": None}
    assert logical_axes("layers/experts/gate_up", 4) == rules["layers/experts/gate_up"]
    tree = {"moe": {"experts": {"gate_up": jax.ShapeDtypeStruct((3, 4, 8, 6), np.float32)}}}
    found = shardings(tree, mesh, axes=axes)["moe"]["experts"]["gate_up"]
    assert found.spec == P(None, "expert", "fsdp", "tensor")
    with pytest.raises(ValueError, match=r"axes=\{'embed': 'x'\}"):
        load(path, mesh=Mesh(np.array(jax.devices()), ("x",)))


def test_axes_are_automatic():
    found = shardings({"bias": jax.ShapeDtypeStruct((8,), np.float32)}, jax.make_mesh((8,), ("tensor",)))
    assert found["bias"].mesh == Mesh(np.array(jax.devices()), ("tensor",))


def test_an_axis_that_does_not_fit_is_not_divided(mesh):
    tree = {"up": {"kernel": jax.ShapeDtypeStruct((7, 8), np.float32)}, "scale": jax.ShapeDtypeStruct((8,), np.float32)}
    found = shardings(tree, mesh)
    assert found["up"]["kernel"].spec == P(None, "tensor") and found["scale"].spec == P(None)
