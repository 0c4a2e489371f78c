"""`sites` and `coverage`: what a call does with every parameter, told without running it."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from constructs import LORA, Construct, normal
from function_constructs import FUNCTIONS
from linen_constructs import LINEN

import jpeft


TOKENS = 8  # in the inputs of the constructs that are named here

FLOPS = {
    "nn.Dense": {"kernel": 2 * TOKENS * 6 * 10},
    "nn.DenseGeneral": {"kernel": 2 * 2 * (4 * 6) * (2 * 5)},
    "nn.Conv 2-D": {"kernel": 2 * (2 * 5 * 4) * (3 * 2 * 3) * 5},
    "nn.scan": {"block/up/kernel": 3 * 2 * TOKENS * 6 * 5, "block/out/kernel": 3 * 2 * TOKENS * 5 * 6},
    "nn.scan of scan": {"block/up/kernel": 9 * 2 * TOKENS * 6 * 5},
    "nn.remat": {"block/up/kernel": 2 * TOKENS * 6 * 5},
    "nn.Embed": {"embedding": 0},
    "nn.Embed, tied": {"Embed_0/embedding": 2 * TOKENS * 6 * 7},
    "w used twice": {"w": 2 * 2 * TOKENS * 6 * 6},
    "ragged_dot": {"w": 2 * TOKENS * 6 * 6},
    "experts by einsum": {"w": 2 * 9 * 6 * 6},
}
OPERATIONS = {
    "nn.Dense": {"kernel": ("dot_general",), "bias": ("add",)},
    "nn.Conv 1-D": {"kernel": ("conv",)},
    "nn.Embed, tied": {"Embed_0/embedding": ("gather", "dot_general")},
    "ragged_dot": {"w": ("ragged_dot",)},
    "scaled by a parameter": {"w": ("dot_general",), "g": ("mul",)},
}


@pytest.mark.parametrize("name", FLOPS)
def test_flops(name):
    sites = (LINEN | FUNCTIONS)[name].sites()
    assert {path: sites[path].flops for path in FLOPS[name]} == FLOPS[name]


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name):
    sites = (LINEN | FUNCTIONS)[name].sites()
    assert {path: sites[path].ops for path in OPERATIONS[name]} == OPERATIONS[name]


def test_modules():
    """What modules are called with and return, and over which first axes their parameters are stacked."""
    modules = LINEN["nn.scan of scan"].sites().modules
    up = modules["block/up"]
    assert (up.features_in, up.features_out, up.stack) == (6, 5, (3, 3))
    assert modules[""].stack == ()
    assert LINEN["nn.scan, axis 1"].sites().modules["block/up"].stack is None


def test_a_model_that_fits_no_machine():
    size = 2**20
    model, x = nn.Dense(size), jax.ShapeDtypeStruct((size, size), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    sites = jpeft.sites(model, shapes, x)
    assert (sites["kernel"].axes, sites["kernel"].flops) == ("io", 2 * size**3)
    params = jax.eval_shape(LORA, shapes["params"])
    assert math.prod(params["kernel"].a.shape) == 2 * size
    assert dict(jpeft.coverage(model, {"params": params}, x)) == {"kernel": "branched"}


def test_what_is_no_kernel_has_no_letters():
    model, x = nn.LayerNorm(), normal(2, 6)
    site = jpeft.sites(model, jax.eval_shape(model.init, jax.random.key(0), x), x)["scale"]
    assert (site.axes, site.ops, site.flops) == (None, ("mul",), 0)


def test_letters_of_a_kernel_that_is_split():
    """The product tells, not the split."""
    split = lambda params, x: sum(x @ w for w in jnp.split(params["w"], 3, axis=1))
    construct = Construct(split, (normal(2, 6),), {"w": "io"}, {"w": (6, 15)})
    assert construct.sites()["w"].axes == "io"


def test_tables():
    construct = LINEN["nn.Embed, tied"]
    rows = str(construct.sites()).splitlines()
    assert rows[0].split() == ["path", "shape", "dtype", "axes", "operations", "GFLOP"]
    row = next(row for row in rows if row.startswith("dense/kernel"))
    assert row.split()[1:] == ["(6,", "6)", "float32", "io", "dot_general", "5.76e-07"]
    coverage = jpeft.coverage(construct.run, {"params": construct.adapted()}, *construct.args)
    assert str(coverage).splitlines()[0].split() == ["Embed_0/embedding", "LoRA", "branched", "gather", "dot_general"]
