"""Every moment of an optimizer's state is found, whatever holds it."""

import jax
import jax.numpy as jnp
import optax

from jpeft.optim._state import map_moments


def test_every_moment():
    trainable = {"a": jnp.ones(3), "b": {"c": jnp.ones((2, 2)), "frozen": None}}
    adam = optax.adam(1e-3)
    states = {
        "plain": adam.init(trainable),
        "chained": optax.chain(optax.clip(1.0), adam).init(trainable),
        "parted": optax.partition({"x": adam, "y": adam}, {"a": "x", "b": {"c": "y", "frozen": None}}).init(trainable),
    }
    for name, state in states.items():
        marked = map_moments(lambda m, p: m + p, state, trainable, trainable)
        total = sum(x.sum() for x in jax.tree.leaves(marked) if x.dtype == jnp.float32)
        assert total == 2 * 7, name  # seven entries of two moments
