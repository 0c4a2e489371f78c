"""Arrays for tests, and a loss of them."""

import jax
import jax.numpy as jnp


def normal(n, *shape):
    """Normal numbers, others for every `n`."""
    return jax.random.normal(jax.random.key(n), shape)


def waves(y):
    """A loss of any output: how far it is from a wave."""
    return jnp.mean((y - jnp.cos(jnp.arange(y.size)).reshape(y.shape)) ** 2)
