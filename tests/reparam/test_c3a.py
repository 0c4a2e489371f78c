"""Circular correlations: one entry of a kernel is one diagonal of a block, and sums of them are dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import circulant

import jpeft


def test_by_circulant_matrices():
    """Those of SciPy, whose first column is given."""
    c = np.random.default_rng(0).normal(size=(3, 2, 4)).astype("f")
    node = jpeft.C3A(c=jnp.asarray(c))
    dense = np.block([[circulant(c[i, o]) for o in range(2)] for i in range(3)]) / 12
    x = jax.random.normal(jax.random.key(1), (2, 5, 12))
    np.testing.assert_allclose(node.weight(jnp.zeros((12, 8))), dense, rtol=1e-6)
    np.testing.assert_allclose(node.branch(x, None), x @ dense, rtol=0, atol=1e-5)


@pytest.mark.parametrize("block", [5, 8, 1])
def test_the_first_entry_alone_scales(block):
    """It is the unit of circular convolution: C = c I / in."""
    c = jnp.zeros((1, 1, block)).at[..., 0].set(3.0)
    x = jax.random.normal(jax.random.key(0), (4, block))
    np.testing.assert_allclose(jpeft.C3A(c=c).branch(x, None), 3 * x / block, rtol=1e-5, atol=1e-6)


def test_rank_is_of_the_transform():
    """A circulant matrix has as much rank as its transform has entries that are not zero: here 2 of 8."""
    c = jnp.asarray(np.cos(2 * np.pi * 3 * np.arange(8) / 8), jnp.float32)
    assert np.linalg.matrix_rank(jpeft.C3A(c=c[None, None]).weight(jnp.zeros((8, 8))), tol=1e-5) == 2


def test_bfloat16_inputs_are_transformed_in_float32():
    c, x = jax.random.normal(jax.random.key(0), (1, 1, 8)), jnp.ones((2, 8), jnp.bfloat16)
    y = jpeft.C3A(c=c).branch(x, None)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), jnp.full((2, 8), c.sum() / 8), rtol=1e-2)


def test_start():
    w = jax.random.normal(jax.random.key(0), (12, 8))
    make = lambda **options: jpeft.c3a({"kernel": w}, **options)["kernel"]
    assert make().c.shape == (3, 2, 4) and make(block=2).c.shape == (6, 4, 2)
    np.testing.assert_array_equal(make(init="zeros").value(), w)
    c = jpeft.c3a({"kernel": jnp.ones((64, 64))}, block=1)["kernel"].c
    bound = (6 / 128) ** 0.5
    assert 0.95 * bound < jnp.abs(c).max() <= bound and jnp.abs(jnp.mean(c)) < 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [({"block": 3}, r"both sides of a kernel \(12, 8\), not 3"), ({"init": "x"}, "'x': one of xavier, zeros")],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.c3a({"kernel": jnp.ones((12, 8))}, **options)
