"""Values out of the inside of computations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft.mixture._taps import tap, tapped


def inner(x):
    return tap(jnp.sin(x), "sin") * 2


def looped(x):
    return jax.lax.scan(lambda carry, _: (inner(carry), jnp.sum(carry)), x, None, length=3)[0]


X = jnp.arange(4.0)


@pytest.mark.parametrize("wrap", [lambda fn: fn, jax.jit, jax.checkpoint, lambda fn: jax.jit(jax.checkpoint(fn))])
def test_one_value(wrap):
    y, (found,) = tapped(lambda: {"y": wrap(inner)(X), "fixed": None, "name": "n"}, "sin")
    assert y["fixed"] is None and y["name"] == "n"
    np.testing.assert_allclose(y["y"], 2 * np.sin(X), rtol=1e-6)
    np.testing.assert_allclose(found, np.sin(X), rtol=1e-6)


@pytest.mark.parametrize("wrap", [lambda fn: fn, jax.jit, jax.checkpoint])
def test_steps_of_a_loop_come_first(wrap):
    y, (found,) = tapped(lambda: wrap(looped)(X), "sin")
    expected = [np.sin(X)]
    for _ in range(2):
        expected.append(np.sin(2 * expected[-1]))
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-5)
    np.testing.assert_allclose(y, 2 * expected[-1], rtol=1e-5)


def test_gradients_reach_what_was_tapped():
    def total(x):
        y, (found,) = tapped(lambda: jax.checkpoint(looped)(x), "sin")
        return jnp.sum(y) + jnp.sum(found**2)

    def by_hand(x):
        first = jnp.sin(x)
        second = jnp.sin(2 * first)
        third = jnp.sin(2 * second)
        return jnp.sum(2 * third) + jnp.sum(first**2 + second**2 + third**2)

    np.testing.assert_allclose(jax.jit(jax.grad(total))(X), jax.grad(by_hand)(X), rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(total)(X[:, None]), jax.vmap(by_hand)(X[:, None]), rtol=1e-5)


def test_other_names_stay_inside():
    _, found = tapped(lambda: looped(X), "cos")
    assert found == []


def test_a_branch_gives_nothing_out():
    with pytest.raises(ValueError, match="`cond`"):
        tapped(lambda: jax.lax.cond(X[0] > 0, inner, lambda x: x, X), "sin")
