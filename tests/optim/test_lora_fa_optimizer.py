"""LoRA-FA: the step in B that is nearest to a step of full fine-tuning, and what PEFT does."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft_net
import pytest
from arrays import normal

import jpeft
from jpeft.optim import lora_fa


PARAMS = {"kernel": normal(0, 3, 6, 8)}  # a stack of three
G = normal(1, 3, 6, 8)


def loss(params):
    return jnp.sum(jpeft.merge(params)["kernel"] * G)  # of which the gradient is G


def step(tuned, tx):
    trainable, frozen = jpeft.partition(tuned)
    grads = jax.grad(lambda t: loss(jpeft.combine(t, frozen)))(trainable)
    updates, _ = tx.update(grads, tx.init(trainable), trainable, frozen=frozen)
    return jpeft.combine(optax.apply_updates(trainable, updates), frozen)


@pytest.mark.parametrize("freeze_a", [False, True])
def test_a_step_is_the_projection_of_the_dense_gradient(freeze_a):
    tuned = jpeft.lora(PARAMS, rank=2, alpha=10, freeze_a=freeze_a, targets={"kernel": "sio"})
    a = tuned["kernel"].a
    found = jpeft.merge(step(tuned, lora_fa(optax.sgd(0.1))))["kernel"] - PARAMS["kernel"]
    for n in range(3):
        nearest = np.linalg.lstsq(a[n], G[n], rcond=None)[0]  # the C for which A C is nearest to G
        np.testing.assert_allclose(found[n], -0.1 * a[n] @ nearest, atol=1e-5)


def test_a_stays_whatever_the_inner_optimizer_does():
    tuned = jpeft.lora(PARAMS, rank=2, targets={"kernel": "sio"})
    after = step(tuned, lora_fa(optax.adamw(0.1, weight_decay=0.5)))
    np.testing.assert_array_equal(after["kernel"].a, tuned["kernel"].a)
    assert (after["kernel"].b != tuned["kernel"].b).all()


def test_nested_terms_have_each_their_own_a():
    once = jpeft.lora(PARAMS, rank=2, alpha=6, targets={"kernel": "sio"}, key=jax.random.key(5))
    twice = jpeft.lora(once, rank=1, targets={"kernel": "sio"})
    inner = step(twice, lora_fa(optax.sgd(0.1)))["kernel"].base
    alone = step(once, lora_fa(optax.sgd(0.1)))["kernel"]
    chex.assert_trees_all_close((inner.a, inner.b), (alone.a, alone.b), atol=1e-6)


def test_what_is_of_no_lora_node_trains_as_ever():
    tuned = jpeft.lora(PARAMS | {"bias": jnp.ones(8)}, rank=2, targets={"kernel": "sio"})
    trainable, frozen = jpeft.partition(jpeft.unfreeze(tuned, targets="bias"))
    tx = lora_fa(optax.sgd(0.1))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, trainable), tx.init(trainable), trainable, frozen=frozen)
    np.testing.assert_allclose(updates["bias"].array, jnp.full(8, -0.1))


def test_a_linearly_dependent_a():
    tuned = jpeft.lora(PARAMS, rank=2, targets={"kernel": "sio"})
    column = tuned["kernel"].a[..., :1]
    tuned = {"kernel": tuned["kernel"].replace(a=jnp.concatenate([column, column], axis=-1))}
    found = jpeft.merge(step(tuned, lora_fa(optax.sgd(0.1))))["kernel"] - PARAMS["kernel"]
    projector = column[0] @ column[0].T / jnp.sum(column[0] ** 2)
    np.testing.assert_allclose(found[0], -0.1 * projector @ G[0], atol=1e-4)


def test_what_it_needs():
    trainable, _ = jpeft.partition(jpeft.lora(PARAMS, rank=2, freeze_a=True, targets={"kernel": "sio"}))
    tx = lora_fa(optax.sgd(0.1))
    with pytest.raises(ValueError, match="frozen=frozen"):
        tx.update(trainable, tx.init(trainable), trainable)
    with pytest.raises(ValueError, match="no LoRA node"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="no LoRA node"):
        tx.update(trainable, tx.init(trainable))


@pytest.mark.parametrize("freeze_a", [False, True])
def test_as_peft_trains(freeze_a):
    decayed = lambda u, p: u - 1e-2 * 0.1 * (p + u)  # PEFT decays what a step has led to, not what it started from
    adamw = optax.chain(optax.adam(1e-2, eps=1e-12), optax.stateless_with_tree_map(decayed))
    how = {"rank": 2, "alpha": 6, "freeze_a": freeze_a, "targets": ["one/kernel", "two/kernel"]}
    peft_net.check("lora_fa", jpeft.lora(peft_net.base("lora_fa"), **how), lora_fa(adamw))
