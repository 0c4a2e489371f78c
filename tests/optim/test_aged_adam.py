"""Adam with an age for every entry: Optax's own where nothing is replaced, and a first step for what is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft


PARAMS = {"a": jnp.ones((3, 4)), "b": {"c": jnp.ones(5), "frozen": None}}


def gradients(step, like=PARAMS):
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(jax.random.key(step), len(leaves))
    return treedef.unflatten([jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)])


def close(found, expected, rtol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6), found, expected)


@pytest.mark.parametrize("settings", [{}, {"b1": 0.5, "b2": 0.9, "eps": 1e-2}])
def test_is_adam_where_nothing_is_replaced(settings):
    ours, theirs = jpeft.optim.scale_by_aged_adam(**settings), optax.scale_by_adam(**settings)
    state, expected_state = ours.init(PARAMS), theirs.init(PARAMS)
    for step in range(6):
        found, state = jax.jit(ours.update)(gradients(step), state)
        with jax.numpy_dtype_promotion("standard"):  # Optax counts steps in integers
            expected, expected_state = theirs.update(gradients(step), expected_state)
        close(found, expected)
    close((state.mu, state.nu), (expected_state.mu, expected_state.nu))


def test_a_replaced_entry_starts_as_adam_does():
    tx = jpeft.optim.scale_by_aged_adam()
    one = {"a": jnp.ones(4)}
    state = tx.init(one)
    for step in range(5):
        _, state = tx.update(gradients(step, one), state)
    replaced = jnp.array([True, False, False, True])
    fresh = jax.tree.map(lambda x: jnp.where(replaced, jnp.zeros_like(x), x), state)
    kept, _ = tx.update(gradients(9, one), state)
    found, after = tx.update(gradients(9, one), fresh)
    np.testing.assert_array_equal(after.age["a"], [1, 6, 6, 1])
    first, _ = tx.update(gradients(9, one), tx.init(one))
    np.testing.assert_array_equal(found["a"], jnp.where(replaced, first["a"], kept["a"]))
    np.testing.assert_allclose(jnp.abs(first["a"]), 1, rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, None])
def test_ages_count_on_where_bfloat16_cannot(dtype):
    """A count in bfloat16 stays at 256, and one that is copied before it is raised stays at its start."""
    tx = jpeft.optim.scale_by_aged_adam(dtype=dtype)
    params = {"w": jnp.ones(2, jnp.float32 if dtype else jnp.bfloat16)}
    assert jnp.bfloat16(256) + jnp.bfloat16(1) == 256
    step = lambda state, _: (tx.update({"w": params["w"]}, state)[1], None)
    state, _ = jax.lax.scan(step, tx.init(params), length=300)
    np.testing.assert_array_equal(state.age["w"], [300, 300])
    assert state.age["w"].dtype == jnp.int32
    assert state.mu["w"].dtype == state.nu["w"].dtype == jnp.bfloat16


def test_updates_keep_the_dtype_of_gradients():
    tx = jpeft.optim.scale_by_aged_adam(dtype=jnp.bfloat16)
    params = {"half": jnp.ones(3, jnp.bfloat16), "whole": jnp.ones(3)}
    updates, _ = tx.update(params, tx.init(params))
    assert updates["half"].dtype == jnp.bfloat16 and updates["whole"].dtype == jnp.float32
