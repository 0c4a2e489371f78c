"""Gates of changes: their limits, their distribution, their gradients, and what the three phases leave."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import waves

import jpeft
from jpeft.testing import subject


W = jax.random.normal(jax.random.key(0), (40, 50))
D = jax.random.normal(jax.random.key(1), W.shape)
X = jax.random.normal(jax.random.key(2), (6, 40))


def node(**fields):
    made = jpeft.diff_pruning({"kernel": W}, **fields)["kernel"]
    return made.replace(values=D)


def loss(node, key=None):
    y = jpeft.apply(lambda params, x: x @ params["kernel"], {"kernel": node}, X, rngs=key)
    return waves(y)


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("key", [None, jax.random.key(7)])
def test_open_gates_are_full_fine_tuning(structured, key):
    """Value and gradient are those of W + D."""
    found, slope = jax.value_and_grad(loss)(node(start=30.0, structured=structured), key)
    want, full = jax.value_and_grad(lambda w: loss(w))(W + D)
    np.testing.assert_allclose(found, want, rtol=1e-6)
    np.testing.assert_allclose(slope.values, full, rtol=1e-5, atol=1e-7)
    assert not slope.alpha.any(), "a gate that is clipped has a gradient"


@pytest.mark.parametrize("key", [None, jax.random.key(7)])
def test_shut_gates_are_the_base(key):
    found, slope = jax.value_and_grad(loss)(node(start=-30.0), key)
    assert found == loss(W)
    assert not any(x.any() for x in jax.tree.leaves((slope.values, slope.alpha, slope.alpha_group)))


def test_no_gradient_at_the_very_end():
    """From 0, without noise, the stretched gate is 0 exactly."""
    tuned = node(start=0.0, structured=False)
    assert not tuned.change.any() and not jax.grad(loss)(tuned).alpha.any()


@pytest.mark.parametrize("bounds", [(-1.5, 1.5), (-0.1, 1.1)])
@pytest.mark.parametrize("alpha", [-2.0, 0.3, 1.5])
def test_gates_are_open_as_often_as_the_penalty_has_it(bounds, alpha):
    """The standard deviation of the mean of 2000 gates is at most 0.011."""
    tuned = node(start=alpha, bounds=bounds, structured=False)
    share = np.mean(tuned.drawn(jax.random.key(3)).change != 0)
    want = jpeft.l0_penalty({"kernel": tuned}) / W.size
    assert abs(share - want) < 0.04
    np.testing.assert_allclose(want, 1 / (1 + np.exp(-alpha) * -bounds[0] / bounds[1]), rtol=1e-5)


def test_one_gate_for_a_matrix():
    """It multiplies those of the entries, and there is one for each layer of a stack."""
    stack = jpeft.diff_pruning({"kernel": jnp.stack([W] * 3)}, targets={"kernel": "sio"}, start=0.4)["kernel"]
    assert stack.alpha_group.shape == (3,)
    stack = stack.replace(values=jnp.stack([D] * 3), alpha_group=jnp.array([30.0, 0.2, -30.0]))
    gate = lambda x: np.clip(3 / (1 + np.exp(-x)) - 1.5, 0, 1)
    want = np.stack([W + gate(0.4) * gate(x) * D for x in (30.0, 0.2, -30.0)])
    np.testing.assert_allclose(stack.value(), want, rtol=1e-5, atol=1e-6)
    one = jpeft.l0_penalty(stack.replace(alpha_group=None))
    np.testing.assert_allclose(jpeft.l0_penalty(stack) - one, 1 + 1 / (1 + np.exp(-0.2)), rtol=1e-4)


def test_noise_is_hard_concrete():
    """Against the formula, for the numbers that the key gives."""
    tuned = node(start=0.7)
    drawn = tuned.drawn(jax.random.key(12))
    u = 1 / (1 + np.exp(-np.asarray(drawn.noise[0], np.float64)))
    assert u.min() > 1e-4 * 0.99 and u.max() < 1 - 1e-4 * 0.99
    assert abs(np.mean(u) - 0.5) < 0.03 and abs(np.var(u) - 1 / 12) < 0.01
    gate = lambda noise: np.clip(3 / (1 + np.exp(-(np.asarray(noise, np.float64) + 0.7))) - 1.5, 0, 1)
    entries, group = drawn.noise
    assert group.shape == () and 0 < gate(group) < 1
    np.testing.assert_allclose(drawn.change, D * gate(entries) * gate(group), rtol=1e-4, atol=1e-5)
    assert (tuned.drawn(jax.random.key(6)).noise[0] != drawn.noise[0]).any()


def test_the_penalty_is_of_nested_nodes_too():
    tuned = jpeft.diff_pruning({"kernel": W})
    np.testing.assert_array_equal(jpeft.l0_penalty(jpeft.lora(tuned, rank=2)), jpeft.l0_penalty(tuned))
    with pytest.raises(ValueError, match=r"no DiffPruning node.*`jpeft\.diff_pruning"):
        jpeft.l0_penalty(jpeft.delta({"kernel": W}))


@pytest.mark.parametrize("bounds", [(0.0, 1.5), (-1.5, 1.0)])
def test_refuses_gates_that_cannot_shut_or_open(bounds):
    with pytest.raises(ValueError, match="below 0 and above 1"):
        jpeft.diff_pruning({"kernel": W}, bounds=bounds)


def groups(tree):
    """What trains by what it is: gates, or changes."""
    name = lambda path, _: "gates" if "alpha" in jax.tree_util.keystr(path[-1:]) else "changes"
    return jax.tree_util.tree_map_with_path(name, tree)


def train(model, params, tx, penalty, steps, key=None):
    """Parameters after steps of `tx` on the model's loss and the penalty."""
    trainable, frozen = jpeft.partition(params)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def slope(trainable, key):
        params = jpeft.combine(trainable, frozen)
        y = jpeft.apply(model.model, {"params": params}, *model.args, rngs=None if key is None else {"dropout": key})
        fit = waves(y)
        return fit + penalty(params), fit

    @jax.jit
    def step(trainable, state, key):
        (_, fit), grads = slope(trainable, key)
        with jax.numpy_dtype_promotion("standard"):  # Optax counts steps in integers
            updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, fit

    state, fits = tx.init(trainable), []
    for n in range(steps):
        trainable, state, fit = step(trainable, state, None if key is None else jax.random.fold_in(key, n))
        fits.append(float(fit))
    return jpeft.combine(trainable, frozen), fits


@pytest.mark.slow
def test_three_phases():
    """Gates shut, few entries stay, and these alone go on training: exactly as many as were asked for."""
    model = subject("decoder")
    tx = optax.partition({"changes": optax.adam(5e-3), "gates": optax.adam(0.1)}, groups)
    start = jpeft.diff_pruning(model.params)
    gated, fits = train(model, start, tx, lambda p: 3e-4 * jpeft.l0_penalty(p), 60, jax.random.key(0))
    assert fits[-1] < fits[0]
    assert jpeft.l0_penalty(gated) < 0.9 * jpeft.l0_penalty(start)

    sparse = jpeft.sparsify(gated, density=0.005)
    tuned, fits = train(model, sparse, optax.adam(5e-3), lambda p: 0.0, 20)
    assert fits[-1] < fits[0]
    pairs = zip(jax.tree.leaves(jpeft.merge(tuned)), jax.tree.leaves(model.params), strict=True)
    changed = sum(np.count_nonzero(x != y) for x, y in pairs)
    but_head = sum(x.size for x in jax.tree.leaves(model.params)) - model.params["lm_head"]["kernel"].size
    assert changed == int(0.005 * but_head)
