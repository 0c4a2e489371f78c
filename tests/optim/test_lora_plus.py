"""LoRA+: which arrays have which learning rate, and what PEFT does."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft_net
import pytest

import jpeft
from jpeft.optim import lora_plus


PARAMS = {"up": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}, "table": {"embedding": jnp.ones((5, 4))}}


def tuned(method):
    return jpeft.unfreeze(method(PARAMS, rank=2, targets=["up/kernel", "table/embedding"]), targets="up/bias")


def update(tx, trainable):
    ones = jax.tree.map(jnp.ones_like, trainable)
    return tx.update(ones, tx.init(trainable), trainable)[0]


def test_a_step_of_gradient_descent_is_longer_for_b_alone():
    trainable, _ = jpeft.partition(tuned(jpeft.lora))
    found = update(lora_plus(optax.sgd(0.5), ratio=8.0), trainable)
    for node in (found["up"]["kernel"], found["table"]["embedding"]):
        chex.assert_trees_all_close((node.a, node.b), (jnp.full(node.a.shape, -0.5), jnp.full(node.b.shape, -4.0)))
    chex.assert_trees_all_close(found["up"]["bias"].array, jnp.full(6, -0.5))


def test_embeddings_and_vectors_have_their_own():
    trainable, _ = jpeft.partition(tuned(jpeft.dora))
    found = update(lora_plus(optax.sgd(1.0), ratio=8.0, embedding_ratio=0.25, vectors=True), trainable)
    mean = jax.tree.map(lambda x: float(jnp.mean(x)), found)
    kernel, table = mean["up"]["kernel"], mean["table"]["embedding"]
    assert (kernel.a, kernel.b, kernel.magnitude, mean["up"]["bias"].array) == (-1, -8, -8, -8)
    assert (table.a, table.b, table.magnitude) == (-0.25, -0.25, -0.25)


def test_stacked_and_nested_factors():
    layers = {"layers": {"kernel": jnp.ones((3, 4, 6))}}
    targets = {"layers/kernel": "sio"}
    once = jpeft.dora(layers, rank=2, targets=targets)
    trainable, _ = jpeft.partition(jpeft.lora(once, rank=1, targets=targets))
    found = update(lora_plus(optax.sgd(1.0), ratio=8.0, vectors=True), trainable)["layers"]["kernel"]
    means = jax.tree.map(lambda x: float(jnp.mean(x)), (found.a, found.b, found.base.a, found.base.b))
    assert means == (-1, -8, -1, -8)
    np.testing.assert_array_equal(found.base.magnitude, jnp.full((3, 6), -8.0))  # a vector for each layer


def test_a_ratio_of_one_is_the_inner_optimizer():
    trainable, _ = jpeft.partition(tuned(jpeft.lora))
    inner = optax.adamw(1e-2, weight_decay=0.1)
    with jax.numpy_dtype_promotion("standard"):  # Optax counts steps in integers
        expected = update(inner, trainable)
    chex.assert_trees_all_equal(update(lora_plus(inner, ratio=1.0), trainable), expected)


def test_ratios_are_positive():
    with pytest.raises(ValueError, match=r"positive, not .*'ratio': 0"):
        lora_plus(optax.sgd(1.0), ratio=0)
    with pytest.raises(ValueError, match="positive"):
        lora_plus(optax.sgd(1.0), embedding_ratio=-1.0)


def undecayed(tree):
    return jax.tree.map(lambda x: not isinstance(x, jpeft.Free), tree, is_leaf=lambda x: isinstance(x, jpeft.Free))


def test_as_peft_trains():
    case = "lora_plus"
    params = peft_net.base(case)
    tree = jpeft.lora(params, rank=2, alpha=6, targets=["table/embedding", "one/kernel", "two/kernel"])
    tree = jpeft.unfreeze(tree, targets=".*/bias")
    inner = optax.adamw(1e-2, weight_decay=0.1, mask=undecayed)  # PEFT decays no bias
    peft_net.check(case, tree, lora_plus(inner, ratio=8.0, embedding_ratio=0.3, vectors=True))


def test_as_peft_trains_dora():
    case = "lora_plus_dora"
    tree = jpeft.dora(peft_net.base(case), rank=2, alpha=6, targets=["one/kernel", "two/kernel"])
    peft_net.check(case, tree, lora_plus(optax.adamw(1e-2, weight_decay=0.1), ratio=8.0, vectors=True))


def test_the_factors_of_blocks_are_factors():
    trainable, _ = jpeft.partition(jpeft.gralora({"kernel": jnp.ones((8, 8))}, rank=4, hybrid=2))
    found = jax.tree.map(lambda x: float(jnp.mean(x)), update(lora_plus(optax.sgd(1.0), ratio=8.0), trainable))
    assert (found["kernel"].a, found["kernel"].b, found["kernel"].whole_a, found["kernel"].whole_b) == (-1, -8, -1, -8)


def test_refuses_what_has_no_factors():
    trainable, _ = jpeft.partition(jpeft.vera({"kernel": jnp.ones((8, 8))}, rank=2))
    with pytest.raises(ValueError, match="the ratio would change nothing"):
        lora_plus(optax.sgd(1.0)).init(trainable)
    lora_plus(optax.sgd(1.0), vectors=True).init(trainable)
