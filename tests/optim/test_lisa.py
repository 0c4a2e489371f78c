"""LISA's draw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft.optim import lisa


def test_every_layer_equally_often():
    """Two of eight layers, never one twice: each in a quarter of the periods, each pair in one of 28."""
    periods = 4000
    draws = np.asarray(jax.vmap(lambda n: lisa(n, 8, active=2, key=jax.random.key(0)))(jnp.arange(periods)))
    assert draws.dtype == np.int32 and np.all(draws[:, 0] < draws[:, 1])
    deviation = np.sqrt(periods * 0.25 * 0.75)
    np.testing.assert_allclose(np.bincount(draws.ravel(), minlength=8), periods / 4, atol=4 * deviation)
    pairs = np.bincount(8 * draws[:, 0] + draws[:, 1], minlength=64)
    assert np.sum(pairs > 0) == 28
    np.testing.assert_allclose(pairs[pairs > 0], periods / 28, atol=4 * np.sqrt(periods / 28))


def test_draws():
    """Of all layers it is all; another key is another draw, and the same the same."""
    np.testing.assert_array_equal(lisa(3, 5, active=5, key=jax.random.key(0)), np.arange(5))
    draws = [[lisa(n, 100, key=jax.random.key(k)).tolist() for n in range(5)] for k in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("active", [0, 6])
def test_refuses(active):
    with pytest.raises(ValueError, match=f"Of 5 layers there cannot be {active} that train"):
        lisa(0, 5, active=active, key=jax.random.key(0))
