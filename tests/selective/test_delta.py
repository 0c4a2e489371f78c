"""A dense change: full fine-tuning over a base that stays, and mixout after its paper."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import normal

import jpeft


RATE = 0.3


def weights():
    return {"up": {"kernel": normal(0, 6, 9), "bias": normal(1, 9)}, "down": {"kernel": normal(2, 9, 4)}}


def tuned(mixout=0.0):
    trainable, frozen = jpeft.partition(jpeft.delta(weights(), mixout=mixout))
    return jpeft.combine(jax.tree.map(lambda x: normal(3, *x.shape), trainable), frozen)


def drawn(params, key=None):
    """What the parameters are in one call."""
    return jpeft.apply(lambda params: jpeft.merge(params), params, rngs=key)


def close(found, expected, **how):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **how), found, expected)


def test_steps_are_those_of_full_fine_tuning():
    def loss(params):
        run = lambda p, x: jnp.tanh(x @ p["up"]["kernel"] + p["up"]["bias"][None]) @ p["down"]["kernel"]
        return jnp.mean(jpeft.apply(run, params, normal(4, 5, 6)) ** 2)

    def trained(params):
        trainable, frozen = jpeft.partition(params)
        tx = optax.adam(0.05)
        state = tx.init(trainable)
        for _ in range(3):
            grads = jax.grad(lambda t: loss(jpeft.combine(t, frozen)))(trainable)
            with jax.numpy_dtype_promotion("standard"):  # Optax counts steps in integers
                updates, state = tx.update(grads, state, trainable)
            trainable = optax.apply_updates(trainable, updates)
        return jpeft.combine(trainable, frozen)

    found, full = trained(jpeft.delta(weights())), trained(jpeft.unfreeze(weights(), targets=".*"))
    close(jpeft.merge(found), jpeft.merge(full), rtol=1e-5, atol=1e-5)
    close(jpeft.strip(found), weights(), rtol=0)


def test_mixout_is_the_formula_of_its_paper():
    """Every entry is the start's, or (theta - p theta_0) / (1 - p): of theta_0 and no other it is made."""
    params = tuned(RATE)
    theta, start = jpeft.merge(params), weights()
    found = drawn(params, jax.random.key(5))
    kept = jax.tree.map(lambda t, s: (t - RATE * s) / (1 - RATE), theta, start)
    rates = []
    for x, k, s in zip(*map(jax.tree.leaves, (found, kept, start)), strict=True):
        back = np.isclose(x, s, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(x, np.where(back, s, k), rtol=1e-4, atol=1e-5)
        rates.append(back.ravel())
    assert 0.15 < np.concatenate(rates).mean() < 0.45


def test_the_mean_of_mixout_is_what_it_is_without_a_key():
    params = tuned(RATE)
    found = jax.vmap(lambda key: drawn(params, key))(jax.random.split(jax.random.key(6), 4000))
    mean = jax.tree.map(lambda x: x.mean(0), found)
    close(mean, jpeft.merge(params), atol=0.15)  # of a deviation of 0.65 |D|, by 4000 draws, six times
    close(drawn(params), jpeft.merge(params), rtol=1e-6)


def test_draws_are_independent():
    params = {name: {"kernel": jnp.zeros((40, 50))} for name in ("a", "b")}
    params = jpeft.delta(params, mixout=0.5)
    params = jax.tree.map(jnp.ones_like, params)
    calls = [drawn(params, jax.random.key(n)) for n in (1, 1, 2)]
    one, other = calls[0]["a"]["kernel"], calls[0]["b"]["kernel"]
    np.testing.assert_array_equal(one, calls[1]["a"]["kernel"])
    for x in (other, calls[2]["a"]["kernel"]):
        assert 0.4 < np.mean(one == x) < 0.6


def test_draws_of_a_nested_node():
    """A change over a change: each has its own."""
    params = jpeft.delta({"w": jnp.zeros((40, 50))}, mixout={"w": 0.5})
    params = jpeft.delta(params, mixout=0.5)
    ones = lambda node, **more: node.replace(values=jnp.ones((40, 50)), **more)
    params = {"w": ones(params["w"], base=ones(params["w"].base))}
    shares = [np.mean(drawn(params, jax.random.key(0))["w"] == n) for n in (0, 2, 4)]
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=0.05)


def test_on_a_quantized_kernel():
    params = jpeft.delta(jpeft.int8({"kernel": normal(0, 32, 16)}))
    moved = {"kernel": params["kernel"].replace(values=normal(1, 32, 16))}
    base = jpeft.merge(params)["kernel"]
    np.testing.assert_allclose(jpeft.merge(moved)["kernel"], base + normal(1, 32, 16), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_refuses_rates(rate):
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        jpeft.delta(weights(), mixout=rate)
