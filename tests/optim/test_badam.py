"""BAdam's orders, and the whole of it against Adam of one layer after another by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.optim import badam, switch


COUNT, EVERY, STEPS = 3, 2, 10
X = jax.random.normal(jax.random.key(0), (16, 6))
W = 0.5 * jax.random.normal(jax.random.key(1), (COUNT, 6, 6))


def loss(w):
    y = X
    for n in range(COUNT):
        y = y + jnp.tanh(y @ w[n])
    return jnp.mean((y - jnp.cos(X)) ** 2)


def by_hand():
    """Adam as its paper has it, of one layer at a time, from zero at every turn; layers from the last to the first."""
    w, trace = W, []
    for step in range(STEPS):
        if step % EVERY == 0:
            mean, square, t = jnp.zeros((6, 6)), jnp.zeros((6, 6)), 0
        n = COUNT - 1 - step // EVERY % COUNT
        g, t = jax.grad(loss)(w)[n], t + 1
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g**2
        w = w.at[n].add(-1e-2 * (mean / (1 - 0.9**t)) / (jnp.sqrt(square / (1 - 0.999**t)) + 1e-8))
        trace.append(w)
    return trace


def test_against_adam_by_hand():
    tx = optax.adam(1e-2)
    params = jpeft.blocks({"layers": {"w": W}}, layers=badam(0, COUNT, order="descending"))
    state = tx.init(jpeft.partition(params)[0])
    for step, want in enumerate(by_hand()):
        if step % EVERY == 0:
            params, state = switch(params, state, tx, layers=badam(step // EVERY, COUNT, order="descending"))
        trainable, frozen = jpeft.partition(params)
        grads = jax.grad(lambda t, f=frozen: loss(jpeft.merge(jpeft.combine(t, f))["layers"]["w"]))(trainable)
        with jax.numpy_dtype_promotion("standard"):  # Optax counts steps in integers
            updates, state = tx.update(grads, state, trainable)
        params = jpeft.combine(optax.apply_updates(trainable, updates), frozen)
        np.testing.assert_allclose(jpeft.merge(params)["layers"]["w"], want, rtol=1e-4, atol=1e-6)


def turns(order, rounds, **how):
    found = jax.vmap(lambda n: badam(n, COUNT, order=order, **how))(jnp.arange(rounds * COUNT))
    assert found.shape == (rounds * COUNT, 1) and found.dtype == jnp.int32
    return np.asarray(found).reshape(rounds, COUNT)


def test_orders():
    np.testing.assert_array_equal(turns("ascending", 2), [[0, 1, 2]] * 2)
    np.testing.assert_array_equal(turns("descending", 2), [[2, 1, 0]] * 2)
    random = turns("random", 60)
    np.testing.assert_array_equal(np.sort(random), [[0, 1, 2]] * 60)
    assert len(np.unique(random, axis=0)) == 6, "not all orders come"
    assert np.any(random != turns("random", 60, key=jax.random.key(1)))


def test_refuses():
    with pytest.raises(ValueError, match="'up': one of random, ascending, descending"):
        badam(0, COUNT, order="up")
