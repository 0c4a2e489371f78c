"""Masks of updates: what is masked out does not move, and what a mask must fit."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import normal

import jpeft
from jpeft.optim import masked_updates


PARAMS = {"up": {"kernel": normal(0, 4, 3, 2), "bias": normal(1, 3, 2)}, "layers": {"kernel": normal(2, 3, 5, 5)}}
TARGETS = {"up/kernel": "ioo", "up/bias": "oo", "layers/kernel": "sio"}
MASK = jax.tree.map(lambda x: np.asarray(x > 0.2), PARAMS)


def loss(params):
    return sum(jnp.sum(jnp.square(x - 1)) for x in jax.tree.leaves(jpeft.merge(params)))


def train(tuned, tx, steps=4):
    trainable, frozen = jpeft.partition(tuned)
    state = tx.init(trainable)
    for _ in range(steps):
        grads = jax.grad(lambda t: loss(jpeft.combine(t, frozen)))(trainable)
        updates, state = tx.update(grads, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    return jpeft.merge(jpeft.combine(trainable, frozen)), state


def moved(after):
    return jax.tree.map(lambda x, y: np.asarray(x != y), after, PARAMS)


METHODS = {
    "unfreeze": lambda: jpeft.unfreeze(PARAMS, targets=".*"),
    "delta": lambda: jpeft.delta(PARAMS, targets=TARGETS),
    "layers": lambda: jpeft.unfreeze(jpeft.unfreeze(PARAMS, targets="up/.*"), targets="layers/.*", layers=[0, 2]),
}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("method", ["unfreeze", "delta"])
def test_weight_decay_moves_no_entry_that_is_masked_out(method, gradients):
    after, _ = train(METHODS[method](), masked_updates(optax.adamw(0.1, weight_decay=0.5), MASK, gradients=gradients))
    chex.assert_trees_all_equal(moved(after), MASK)


def test_masks_of_gradients_do_not_keep_decay_from_moving_weights():
    of_tree = jpeft.unfreeze(MASK, targets=".*")
    masked = optax.stateless(lambda g, _: jax.tree.map(lambda m, x: jnp.where(m, x, 0), of_tree, g))
    with jax.numpy_dtype_promotion("standard"):  # Optax counts steps in integers
        after, _ = train(METHODS["unfreeze"](), optax.chain(masked, optax.adamw(0.1, weight_decay=0.5)))
    assert all(m.all() for m in jax.tree.leaves(moved(after)))


def test_moments_are_zero_with_masked_gradients_alone():
    pairs = lambda tree: zip(jax.tree.leaves(tree), jax.tree.leaves(MASK), strict=True)
    outside = lambda tree: [np.abs(x[~m]).max() for x, m in pairs(tree)]
    _, state = train(METHODS["unfreeze"](), masked_updates(optax.scale_by_adam(), MASK, gradients=True))
    assert not any(outside(state.inner.mu)) and not any(outside(state.inner.nu))
    _, state = train(METHODS["unfreeze"](), masked_updates(optax.scale_by_adam(), MASK))
    assert all(outside(state.inner.mu)) and all(outside(state.inner.nu))


def test_it_trains_as_sparse_changes_do():
    sites = {"targets": TARGETS}
    expected, _ = train(jpeft.sparse(PARAMS, mask=MASK, **sites), optax.sgd(0.05, momentum=0.9))
    found, _ = train(METHODS["unfreeze"](), masked_updates(optax.sgd(0.05, momentum=0.9), MASK))
    chex.assert_trees_all_close(found, expected, atol=1e-6)
    chex.assert_trees_all_equal(moved(found), MASK)


def test_single_layers_have_the_mask_of_theirs():
    tuned = jpeft.unfreeze({"layers": PARAMS["layers"]}, targets=".*", layers=[0, 2])
    after, _ = train(tuned, masked_updates(optax.adamw(0.1, weight_decay=0.5), {"layers": MASK["layers"]}))
    found = after["layers"]["kernel"] != PARAMS["layers"]["kernel"]
    np.testing.assert_array_equal(found, MASK["layers"]["kernel"] & (np.arange(3) != 1)[:, None, None])


def test_booleans_stand_for_whole_parameters_and_none_for_false():
    mask = {"up": {"kernel": True, "bias": False}, "layers": None}
    after, state = train(METHODS["unfreeze"](), masked_updates(optax.adamw(0.1, weight_decay=0.5), mask))
    found = moved(after)
    assert found["up"]["kernel"].all() and not found["up"]["bias"].any() and not found["layers"]["kernel"].any()
    assert [m.shape for m in state.mask] == [()] * 3


def test_a_path_into_a_node_masks_an_array_of_a_method():
    trainable, _ = jpeft.partition(jpeft.lora(PARAMS, rank=2, targets={"layers/kernel": "sio"}))
    half = np.arange(2) == np.zeros((3, 5, 1))
    tx = masked_updates(optax.sgd(1.0), {"layers": {"kernel": {"a": half, "b": True}}})
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, trainable), tx.init(trainable))
    node = updates["layers"]["kernel"]
    np.testing.assert_array_equal(node.a, -1.0 * half)
    np.testing.assert_array_equal(node.b, -jnp.ones((3, 2, 5)))


def test_parameters_in_boxes():
    params = {"kernel": nn.Partitioned(normal(0, 4, 6), ("in", "out"))}
    mask = {"kernel": np.asarray(params["kernel"].value > 0)}
    for tree in (params, jpeft.partition(jpeft.unfreeze(params, targets=".*"))[0]):
        state = masked_updates(optax.sgd(1.0), mask).init(tree)
        np.testing.assert_array_equal(state.mask[0], mask["kernel"])


@pytest.mark.parametrize("method", METHODS)
def test_the_state_can_be_made_under_jit_and_in_bfloat16(method):
    tree, _ = jpeft.partition(METHODS[method]())
    tree = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    tx = masked_updates(optax.adamw(0.1), MASK)
    state = jax.jit(tx.init)(tree)
    chex.assert_trees_all_equal(state, tx.init(tree))
    updates, _ = jax.jit(tx.update)(tree, state, tree)
    chex.assert_trees_all_equal_dtypes(updates, tree)


def test_every_fault_of_a_mask_is_named():
    tuned = jpeft.lora(jpeft.unfreeze(PARAMS, targets="up/kernel"), rank=2, targets={"layers/kernel": "sio"})
    trainable, _ = jpeft.partition(tuned)
    wrong = MASK | {"up": {"kernel": MASK["up"]["kernel"][0], "bias": MASK["up"]["bias"]}}
    with pytest.raises(ValueError, match="does not fit") as e:
        masked_updates(optax.sgd(1.0), wrong).init(trainable)
    for fault in (
        "up/bias: nothing trains there",
        "up/kernel: a mask of bool(3, 2) is no mask of Free with [(4, 3, 2)]",
        "layers/kernel: a mask of bool(3, 5, 5) is no mask of LoRA with [(3, 5, 2), (3, 2, 5)]",
    ):
        assert fault in str(e.value)
    with pytest.raises(ValueError, match=r"up/kernel: a mask of float32\(4, 3, 2\)"):
        masked_updates(optax.sgd(1.0), {"up": {"kernel": PARAMS["up"]["kernel"]}}).init(trainable)


def test_a_mask_of_nothing_is_refused():
    with pytest.raises(ValueError, match="true nowhere"):
        masked_updates(optax.sgd(1.0), jax.tree.map(np.zeros_like, MASK)).init(PARAMS)


def test_a_mask_false_where_nothing_trains_fits():
    trainable, _ = jpeft.partition(jpeft.unfreeze(PARAMS, targets="up/kernel"))
    mask = jax.tree.map(np.zeros_like, MASK) | {"up": {"kernel": MASK["up"]["kernel"]}}
    assert len(masked_updates(optax.sgd(1.0), mask).init(trainable).mask) == 1


def test_what_stands_beside_a_module_is_masked_array_by_array():
    tuned = jpeft.bottleneck({"mlp": {"kernel": normal(0, 4, 4)}}, width=2, targets="mlp")
    trainable, _ = jpeft.partition(tuned)
    down = np.arange(2) == np.zeros((4, 1))
    tx = masked_updates(optax.sgd(1.0), {"mlp": {"bottleneck": {"down": down}}})
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, trainable), tx.init(trainable))
    node = updates["mlp"]["bottleneck"]
    np.testing.assert_array_equal(node.down, -1.0 * down)
    assert not jnp.any(node.up)
