"""What is known of HiRA in closed form: its formula, the rank of its change, and a scale as a special case."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

import jpeft


W = jax.random.normal(jax.random.key(0), (8, 6))


def tuned():
    return jpeft.HiRA(base=W, a=normal(1, 8, 2), b=normal(2, 2, 6))


def test_formula_and_rank():
    """W' = W * (1 + A B), whose change has a higher rank than A B."""
    change = tuned().value() - W
    np.testing.assert_allclose(change, W * (tuned().a @ tuned().b), rtol=1e-4, atol=1e-5)
    assert jnp.linalg.matrix_rank(change) == 6


def test_equal_factors_scale_the_kernel():
    node = jpeft.HiRA(base=W, a=jnp.ones((8, 1)), b=jnp.full((1, 6), 0.5))
    np.testing.assert_allclose(node.value(), 1.5 * W, rtol=1e-6)


def test_start():
    node = jpeft.hira({"w": W}, targets="w")["w"]
    assert node.a.shape == (8, 32)
    np.testing.assert_array_equal(node.value(), W)
    gradient = jax.grad(lambda node: jnp.sum(jnp.sin(node.value())))(node)
    assert np.all(gradient.a == 0) and np.all(gradient.b != 0)


@pytest.mark.parametrize(("options", "message"), [({"rank": 0}, "rank of at least 1"), ({"init": "x"}, "'x': one of")])
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.hira({"w": W}, targets="w", **options)
