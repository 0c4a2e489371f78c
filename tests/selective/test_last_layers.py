"""Some layers, numbered or rows of stacked parameters: the same training, and less of it."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import waves

import jpeft
from jpeft._targets import named_leaves
from jpeft.models import Decoder, DecoderConfig, stack_layers
from jpeft.testing import shaken


COUNT = 3
CONFIG = DecoderConfig(32, 16, 24, COUNT, 4, 2)
IDS = jax.random.randint(jax.random.key(1), (2, 6), 0, 32)


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(Decoder(CONFIG).init, jax.random.key(0), IDS)["params"]
    return shaken(jax.tree.map(lambda x: jnp.zeros(x.shape), shapes), jax.random.key(0), 0.3)


def step(model, tx):
    """A training step of what trains: of the trainable and the frozen tree and the optimizer's state."""

    def step(trainable, frozen, state):
        grads = jax.grad(lambda t: waves(jpeft.apply(model, {"params": jpeft.combine(t, frozen)}, IDS)))(trainable)
        with jax.numpy_dtype_promotion("standard"):  # Optax counts steps in integers
            updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state

    return jax.jit(step)


def trained(model, params):
    tx = optax.adamw(1e-2, weight_decay=0.1)
    (trainable, frozen), run = jpeft.partition(params), step(model, tx)
    state = tx.init(trainable)
    for _ in range(4):
        trainable, state = run(trainable, frozen, state)
    return jpeft.merge(jpeft.combine(trainable, frozen))


@pytest.mark.parametrize("k", [2, COUNT])
def test_scanned_is_unrolled(params, k):
    """After steps of AdamW with weight decay the last k layers are the same, and all else bitwise what it was."""
    numbered = trained(Decoder(CONFIG), jpeft.last_layers(params, k=k))
    stacked = trained(Decoder(CONFIG, scan=True), jpeft.last_layers(stack_layers(params), k=k))
    chex.assert_trees_all_close(stacked, stack_layers(numbered), rtol=1e-4, atol=1e-5)
    for found in (stack_layers(numbered), stacked):
        for name, x in named_leaves(stack_layers(params)).items():
            layers, y = name.startswith("layers/"), named_leaves(found)[name]
            still = COUNT - k if layers else len(x)
            np.testing.assert_array_equal(y[:still], x[:still], err_msg=name)
            assert all(np.any(a != b) for a, b in zip(y[still:], x[still:], strict=True)), name


@pytest.mark.parametrize("layers", [[0], [-1, 0], [1], [2, 0, -2]])
def test_any_layers(params, layers):
    """Of scanned layers, and of a part of each, it is the same training as of numbered ones, and of no other."""
    pick = jpeft.unfreeze(targets=jpeft.patterns.MLP, layers=layers)
    numbered = stack_layers(trained(Decoder(CONFIG), pick(params)))
    stacked = trained(Decoder(CONFIG, scan=True), pick(stack_layers(params)))
    chex.assert_trees_all_close(stacked, numbered, rtol=1e-4, atol=1e-5)
    trains = {n % COUNT for n in layers}
    for name, x in named_leaves(stack_layers(params)).items():
        y = named_leaves(stacked)[name]
        for n in range(len(x)):
            assert np.any(x[n] != y[n]) == ("/mlp/" in name and n in trains), (name, n)


def test_the_base_has_the_other_layers_alone(params):
    """So that no layer is held twice."""
    tuned = jpeft.unfreeze(stack_layers(params), targets=".*", layers=[1])
    node = tuned["layers"]["mlp"]["up"]["kernel"]
    assert (node.layers, node.rows.shape, node.base.shape) == ((1,), (1, 16, 24), (2, 16, 24))
    chex.assert_trees_all_equal(jpeft.merge(tuned), stack_layers(params))


def test_what_does_not_train_costs_nothing(params):
    """A backward pass is twice a forward one: where one of L layers trains, 2 / L of it is left."""
    flops = {}
    for k in (1, COUNT):
        trainable, frozen = jpeft.partition(jpeft.last_layers(params, k=k))
        tx = optax.sgd(1e-2)
        lowered = step(Decoder(CONFIG), tx).lower(trainable, frozen, tx.init(trainable))
        flops[k] = lowered.compile().cost_analysis()["flops"]
    assert flops[1] / flops[COUNT] < (1 + 2 / COUNT) / 3 + 0.1, flops


class Loop(nn.Module):
    """Layers stacked on the second axis of their parameters."""

    @nn.compact
    def __call__(self, x):
        dense = lambda layer, x: (jnp.tanh(layer(x)), None)
        scan = nn.scan(dense, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)
        return scan(nn.Dense(4, name="layers"), x)[0]


def test_another_axis():
    """The gradient of the rows is those rows of the whole gradient."""
    x = jax.random.normal(jax.random.key(0), (5, 4))
    params = shaken(Loop().init(jax.random.key(1), x)["params"], jax.random.key(2))
    tuned = jpeft.last_layers(params, k=2, axis=1)
    trainable, frozen = jpeft.partition(tuned)
    run = lambda t: waves(jpeft.apply(Loop(), {"params": jpeft.combine(t, frozen)}, x))
    found = jax.grad(run)(trainable)["layers"]
    whole = jax.grad(lambda p: waves(Loop().apply({"params": p}, x)))(params)["layers"]
    for name in ("kernel", "bias"):
        assert found[name].rows.shape == whole[name][:, 1:].shape
        np.testing.assert_allclose(found[name].rows, whole[name][:, 1:], rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_equal(jpeft.merge(tuned), params)


def test_a_plain_call_refuses_rows(params):
    tuned = jpeft.last_layers(stack_layers(params), k=1)
    with pytest.raises(ValueError, match=r"Call the model through `jpeft\.apply`"):
        Decoder(CONFIG, scan=True).apply({"params": tuned}, IDS)
