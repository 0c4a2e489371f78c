"""Fira: the residual, how long it is, and how it grows."""

import authors_steps
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_galore import SHAPES, gradients, in_torch, of_kernel, projections

from jpeft.optim import fira, galore


@pytest.mark.parametrize("scale_residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_as_the_authors_step(shape, scale_residual):
    grads = gradients(shape)
    how = {"rank": 2, "every": 3, "scale": 0.25, "scale_residual": scale_residual}
    found, states = of_kernel(fira(1.0, **how), grads)
    expected = authors_steps.fira(in_torch(grads), projections(states), **how)
    for u, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(u, -e.T, atol=1e-4)


def test_at_full_rank_there_is_no_residual():
    grads = gradients((4, 6))
    found, _ = of_kernel(fira(1.0, rank=4, scale=1.0), grads)
    expected, _ = of_kernel(galore(1.0, rank=4, scale=1.0), grads)
    chex.assert_trees_all_close(found, expected, atol=1e-4)


def test_at_full_rank_it_is_adam_where_the_axes_are_the_singular_vectors():
    first = jnp.zeros((4, 6)).at[jnp.arange(4), jnp.arange(4)].set(jnp.array([1.0, -4.0, 3.0, 2.0]))
    grads = [first, *gradients((4, 6))]
    with jax.numpy_dtype_promotion("standard"):  # Optax counts steps in integers
        expected, _ = of_kernel(optax.adam(0.1), grads)
    found, _ = of_kernel(fira(0.1, rank=4, scale=1.0), grads)
    chex.assert_trees_all_close(found, expected, atol=1e-4)


def test_with_gradient_descent_within_it_is_gradient_descent():
    grads = gradients((4, 6), 3)
    found, _ = of_kernel(fira(0.1, rank=2, scale=1.0, limit=None, inner=optax.identity()), grads)
    chex.assert_trees_all_close(found, [-0.1 * g for g in grads], atol=1e-5)


def test_the_residual_grows_no_faster_than_its_limit():
    grads = [g * 10.0**n for n, g in enumerate(gradients((4, 6), 4))]
    how = {"rank": 2, "every": 1, "scale": 1.0, "inner": optax.identity()}
    found, states = of_kernel(fira(1.0, **how, limit=1.5), grads)
    kept, _ = of_kernel(galore(1.0, **how), grads)
    sizes = [np.linalg.norm(u - k) for u, k in zip(found, kept, strict=True)]
    np.testing.assert_allclose(sizes, sizes[0] * 1.5 ** np.arange(4), rtol=1e-4)
    np.testing.assert_allclose(states[-1][0].norms["kernel"], sizes[-1], rtol=1e-4)
    free, _ = of_kernel(fira(1.0, **how, limit=None), grads)
    assert np.linalg.norm(free[-1] - kept[-1]) > 10 * sizes[-1]


def test_a_residual_that_was_zero_can_grow():
    g = gradients((4, 6), 1)[0]
    how = {"rank": 2, "every": 1}
    found, _ = of_kernel(fira(1.0, **how), [jnp.zeros((4, 6)), g, g])
    assert all(jnp.isfinite(u).all() for u in found)
    kept, _ = of_kernel(galore(1.0, **how), [jnp.zeros((4, 6)), g, g])
    assert np.linalg.norm(found[1] - kept[1]) > 0.1
