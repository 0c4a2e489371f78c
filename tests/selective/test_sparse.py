"""A sparse change is training under a mask: step for step, entry for entry, also with weight decay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import normal

import jpeft


X = jax.random.normal(jax.random.key(7), (5, 6))


def weights():
    return {"up": {"kernel": normal(0, 6, 9), "bias": normal(1, 9)}, "down": {"kernel": normal(2, 9, 4)}}


def model(params, x):
    return jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None]) @ params["down"]["kernel"]


def loss(params):
    return jnp.mean(jnp.square(jpeft.apply(model, params, X) - jnp.cos(jnp.arange(4.0))[None]))


def masks(density=0.3):
    """Of two parameters some entries, of the third none."""
    draw = lambda n, x: np.asarray(normal(n, *x.shape) > jnp.quantile(normal(n, *x.shape), 1 - density))
    params = weights()
    return {"up": {"kernel": draw(3, params["up"]["kernel"]), "bias": draw(4, params["up"]["bias"])}, "down": None}


def trained(params, tx, steps=4):
    trainable, frozen = jpeft.partition(params)
    state = tx.init(trainable)
    for _ in range(steps):
        grads = jax.grad(lambda t: loss(jpeft.combine(t, frozen)))(trainable)
        with jax.numpy_dtype_promotion("standard"):  # Optax counts steps in integers
            updates, state = tx.update(grads, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    return jpeft.combine(trainable, frozen)


def close(found, expected):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, expected)


def test_entries_of_the_mask_and_no_others():
    params = jpeft.sparse(weights(), mask=masks())
    up, mask = params["up"]["kernel"], masks()["up"]["kernel"]
    assert up.values.shape == (mask.sum(),) and up.indices.dtype == jnp.int32
    assert not jpeft.summary(params).trainable - mask.sum() - masks()["up"]["bias"].sum()
    tuned = params["up"] | {"kernel": up.replace(values=1 + jnp.arange(mask.sum(), dtype=jnp.float32))}
    found = jpeft.merge(tuned)["kernel"] - weights()["up"]["kernel"]
    want = np.zeros(mask.shape, np.float32)
    want[mask] = np.arange(1, mask.sum() + 1)
    np.testing.assert_allclose(found, want, atol=1e-5)
    assert isinstance(params["down"]["kernel"], jax.Array)


def test_training_is_that_of_all_parameters_with_masked_gradients():
    found = jpeft.merge(trained(jpeft.sparse(weights(), mask=masks()), optax.sgd(0.3)))
    params = weights()
    for _ in range(4):
        grads = jax.grad(loss)(params)
        for name in ("kernel", "bias"):
            masked = jnp.where(masks()["up"][name], grads["up"][name], 0)
            params["up"][name] = params["up"][name] - 0.3 * masked
    close(found, params)
    assert np.abs(found["up"]["kernel"] - weights()["up"]["kernel"]).max() > 1e-2


def test_a_mask_of_everything_is_full_fine_tuning():
    everything = jax.tree.map(lambda x: np.ones(x.shape, bool), weights())
    found = trained(jpeft.sparse(weights(), mask=everything), optax.adam(0.05))
    full = trained(jpeft.unfreeze(weights(), targets=".*"), optax.adam(0.05))
    close(jpeft.merge(found), jpeft.merge(full))


def test_weight_decay_moves_no_other_entry():
    """What a mask of gradients fails at: AdamW decays all that it is given."""
    found = jpeft.merge(trained(jpeft.sparse(weights(), mask=masks()), optax.adamw(0.05, weight_decay=0.5)))
    moved = jax.tree.map(lambda x, y: np.asarray(x != y), found, weights())
    np.testing.assert_array_equal(moved["up"]["kernel"], masks()["up"]["kernel"])
    np.testing.assert_array_equal(moved["up"]["bias"], masks()["up"]["bias"])
    assert not moved["down"]["kernel"].any()


def test_matrices_of_a_stack_have_lists_of_their_own():
    """Five entries of the first, two of the second, in one of three letters and not in the order that is stored."""
    w, mask = normal(0, 4, 2, 3), np.zeros((4, 2, 3), bool)
    mask[[0, 1, 1, 2, 3], 0, [0, 0, 2, 1, 1]] = mask[[0, 3], 1, [2, 2]] = True
    params = jpeft.sparse({"w": w}, mask={"w": mask}, targets={"w": "iso"})
    np.testing.assert_array_equal(params["w"].indices, [[0, 3, 5, 7, 10], [2, 11, 12, 12, 12]])
    tuned = {"w": params["w"].replace(values=jnp.full((2, 5), 2.0))}
    np.testing.assert_allclose(jpeft.merge(tuned)["w"], w + 2.0 * mask, rtol=1e-6)
    plain = jpeft.sparse({"w": w}, mask={"w": mask})["w"]  # as no axis is known to be stacked: one list
    assert plain.values.shape == (7,)
    np.testing.assert_allclose(plain.replace(values=jnp.full(7, 2.0)).value(), w + 2.0 * mask, rtol=1e-6)


def test_changes_add_up():
    """Those of a task and of a language, each trained by itself, one over the other."""
    theta, parts = weights(), []
    for n in (3, 5):
        mask = jpeft.random_mask(theta, density=0.4, key=jax.random.key(n))
        trainable, frozen = jpeft.partition(jpeft.sparse(theta, mask=mask))
        parts.append(jpeft.combine(jax.tree.map(lambda x, n=n: normal(n, *x.shape), trainable), frozen))
    over = lambda x, base: x.replace(base=base)
    both = jax.tree.map(over, *parts, is_leaf=lambda x: isinstance(x, jpeft.Sparse))
    add = lambda task, language, start: task + language - start
    close(jpeft.merge(both), jax.tree.map(add, *map(jpeft.merge, parts), theta))
    close(jpeft.strip(both), theta)


def test_a_bfloat16_model():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights())
    params = jpeft.sparse(half, mask=masks())
    assert params["up"]["kernel"].values.dtype == jnp.float32
    assert jpeft.merge(params)["up"]["kernel"].dtype == jnp.bfloat16
    assert jpeft.apply(model, params, X.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_refuses_masks_that_do_not_fit_and_tells_all_faults():
    params = weights() | {"ids": jnp.arange(3)}
    mask = {
        "up": {"kernel": np.ones((9, 6), bool), "bias": np.ones(9, np.float32)},
        "side": np.ones(2, bool),
        "ids": np.ones(3, bool),
    }
    with pytest.raises(ValueError, match="mask") as e:
        jpeft.sparse(params, mask=mask)
    for fault in (
        "up/kernel: the mask is bool(9, 6), the parameter needs bool(6, 9)",
        "up/bias: the mask is float32(9,), the parameter needs bool(9,)",
        "side: there is no such parameter",
        "ids: its dtype is int32",
    ):
        assert fault in str(e.value)


@pytest.mark.parametrize("mask", [{"up": {"kernel": np.zeros((6, 9), bool)}}, {}], ids=["false", "nothing"])
def test_refuses_a_mask_that_is_true_nowhere(mask):
    with pytest.raises(ValueError, match="true nowhere"):
        jpeft.sparse(weights(), mask=mask)


def test_refuses_matrices_of_which_indices_would_overflow():
    shape = (2**16, 2**15)
    mask = {"table": np.broadcast_to(True, shape)}
    with pytest.raises(ValueError, match=r"\(65536, 32768\) has more entries than an int32"):
        jpeft.sparse({"table": jax.ShapeDtypeStruct(shape, jnp.bfloat16)}, mask=mask)


def test_refuses_targets_in_which_nothing_would_train():
    with pytest.raises(ValueError, match=r"true in no target.*: up/bias, up/kernel"):
        jpeft.sparse(weights(), mask=masks(), targets="down/.*")
