"""Reflections one after the other: the product at once, its start and its order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jpeft


W = jax.random.normal(jax.random.key(0), (8, 5))


def close(found, want, tolerance=1e-5):
    np.testing.assert_allclose(found, want, rtol=0, atol=tolerance * np.abs(want).max())


def reflections(u):
    """H_1, ..., H_r"""
    unit = np.asarray(u, np.float64) / np.linalg.norm(u, axis=0)
    return [np.eye(len(u)) - 2 * np.outer(v, v) for v in unit.T]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**30), rank=st.sampled_from([1, 4, 7]))
def test_one_after_the_other(seed, rank):
    u = jax.random.normal(jax.random.key(seed), (8, rank))
    want = np.asarray(W, np.float64)
    for h in reflections(u):
        want = h @ want
    hra = jpeft.HRA(base=W, u=u)
    close(hra.value(), want, 1e-4)
    whole = hra.weight(jnp.eye(8))
    close(whole @ whole.T, np.eye(8), 1e-4)
    np.testing.assert_allclose(np.linalg.det(whole), (-1) ** rank, atol=1e-4)
    assert np.linalg.matrix_rank(hra.value() - W, tol=1e-3) <= rank


def test_orthogonal_ones_are_one_reflection():
    u = jax.random.normal(jax.random.key(1), (8, 3))
    q = np.linalg.qr(u)[0]
    hra = jpeft.HRA(base=W, u=u, orthogonal=True)
    close(hra.value(), W - 2 * q @ (q.T @ W))
    close(jpeft.HRA(base=W, u=jnp.asarray(q)).value(), hra.value())


def test_pairs_undo_each_other():
    u = jpeft.hra({"kernel": W}, rank=6)["kernel"].u
    np.testing.assert_array_equal(u[:, ::2], u[:, 1::2])
    assert np.linalg.matrix_rank(u) == 3
    close(jpeft.HRA(base=W, u=u).value(), W, 1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 3}, "even one.*not 3"),
        ({"rank": 10}, "from 1 to the 8 inputs.*not 10"),
        ({"rank": 0}, "not 0"),
        ({"init": "zeros"}, "'zeros'"),
        ({"orthogonal": True, "init": "paired"}, "'paired', unless"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.hra({"kernel": W}, **options)
