"""Blocks twice, frozen and tuned, and training what chooses between them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from arrays import waves

import jpeft
from jpeft.testing import shaken


BATCH, LENGTH, WIDTH, BLOCKS = 6, 3, 8, 4
X = jax.random.normal(jax.random.key(0), (BATCH, LENGTH, WIDTH))
LAYER = nn.Dense(WIDTH)


def block(params, x):
    return x + jnp.tanh(LAYER.apply({"params": params}, x))


def shift(seed):
    """The parameters of all blocks."""
    one = LAYER.init(jax.random.key(1), X)["params"]
    return [shaken(one, jax.random.fold_in(jax.random.key(seed), n), 0.5) for n in range(BLOCKS)]


FROZEN, TUNED = shift(2), shift(3)
LOGITS = jax.random.normal(jax.random.key(4), (BATCH, BLOCKS, 2))


def plain(params, x=X):
    return functools.reduce(lambda x, one: block(one, x), params, x)


def stack(blocks):
    return jax.tree.map(lambda *xs: jnp.stack(xs), *blocks)


def trained(forward, chooser, steps=30):
    """Losses, and the tree before and after: of `forward(copies, chooser, x, key)`, from copies that are equal."""
    params = {"frozen": stack(FROZEN)} | jpeft.unfreeze({"tuned": stack(FROZEN), "chooser": chooser}, targets=".*")
    trainable, frozen = jpeft.partition(params)
    tx = optax.adam(3e-2)

    def run(params, x, key):
        return forward((params["frozen"], params["tuned"]), params["chooser"], x, key)

    @jax.jit
    def step(trainable, state, key):
        fit = lambda t: waves(jpeft.apply(run, jpeft.combine(t, frozen), X, key))
        value, grads = jax.value_and_grad(fit)(trainable)
        with jax.numpy_dtype_promotion("standard"):  # Optax counts steps in integers
            updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    state, losses = tx.init(trainable), []
    for n in range(steps):
        trainable, state, value = step(trainable, state, jax.random.key(n))
        losses.append(float(value))
    return losses, jpeft.merge(params), jpeft.merge(jpeft.combine(trainable, frozen))


def check_trained(losses, before, after):
    """The loss falls, and the copy has moved and what chooses, and nothing else."""
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0]
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), after, before)
    assert all(jax.tree.leaves((moved["tuned"], moved["chooser"]))) and not any(jax.tree.leaves(moved["frozen"]))
