"""Blocks and the switch between them: what trains, what is kept, what starts anew, and what that takes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import waves

import jpeft
from jpeft.models import Decoder, DecoderConfig, stack_layers
from jpeft.optim import block_labels, switch
from jpeft.testing import shaken


COUNT = 3
CONFIG = DecoderConfig(32, 16, 24, COUNT, 4, 2)
IDS = jax.random.randint(jax.random.key(1), (2, 6), 0, 32)
TX = optax.adamw(1e-2, eps=1e-4, weight_decay=0.1)  # rounding in gradients near zero does not become steps
OUTSIDE = "embed/.*|norm/.*|lm_head/.*"


@functools.cache
def base(scan):
    shapes = jax.eval_shape(Decoder(CONFIG).init, jax.random.key(0), IDS)["params"]
    with jax.ensure_compile_time_eval():  # what is cached is no tracer
        params = shaken(jax.tree.map(lambda x: jnp.zeros(x.shape), shapes), jax.random.key(0), 0.3)
        return stack_layers(params) if scan else params


def stepper(scan, tx, traces=100):
    """A compiled step of the tree and the optimizer's state."""
    model = Decoder(CONFIG, scan=scan)

    def step(params, state):
        trainable, frozen = jpeft.partition(params)
        loss = lambda t: waves(jpeft.apply(model, {"params": jpeft.combine(t, frozen)}, IDS))
        with jax.numpy_dtype_promotion("standard"):  # Optax counts steps in integers
            updates, state = tx.update(jax.grad(loss)(trainable), state, trainable)
        return jpeft.combine(optax.apply_updates(trainable, updates), frozen), state

    return jax.jit(chex.assert_max_traces(step, traces))


def run(step, params, state, n=2):
    for _ in range(n):
        params, state = step(params, state)
    return params, state


def started(params, tx=TX):
    return params, tx.init(jpeft.partition(params)[0])


def layer(params, n):
    """The plain arrays of one layer."""
    plain = jpeft.merge(params)
    return jax.tree.map(lambda x: x[n], plain["layers"]) if "layers" in plain else plain[f"layers_{n}"]


@functools.cache
def switched(scan, choices=((0, 2), (1,), (2, 1))):
    """The trees before and after every period of two steps."""
    step = stepper(scan, TX)
    params, state = started(jpeft.blocks(base(scan), layers=choices[0]))
    trees = [base(scan)]
    for choice in choices:
        params, state = switch(params, state, TX, layers=choice)
        params, state = run(step, params, state)
        trees.append(params)
    return trees


@pytest.mark.slow
def test_scanned_is_unrolled():
    for numbered, stacked in zip(switched(False)[1:], switched(True)[1:], strict=True):
        chex.assert_trees_all_close(jpeft.merge(stacked), stack_layers(jpeft.merge(numbered)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_all_else_is_bitwise_frozen(scan):
    """With weight decay: layers that train move in all their parameters, others keep what they had become."""
    trees = switched(scan)
    for before, after, active in zip(trees, trees[1:], ((0, 2), (1,), (2, 1)), strict=False):
        for n in range(COUNT):
            same = jax.tree.leaves(jax.tree.map(lambda x, y: bool(jnp.all(x == y)), layer(before, n), layer(after, n)))
            assert same == [n not in active] * len(same)
        for name in ("embed", "norm", "lm_head"):
            chex.assert_trees_all_equal(jpeft.merge(after)[name], base(scan)[name])


@pytest.mark.parametrize("scan", [False, True])
def test_of_all_layers_it_is_adamw(scan):
    step = stepper(scan, TX)
    found, _ = run(step, *started(jpeft.blocks(base(scan), layers=range(COUNT))), 4)
    want, _ = run(step, *started(jpeft.unfreeze(base(scan), targets="layers.*")), 4)
    chex.assert_trees_all_close(jpeft.merge(found), jpeft.merge(want), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scan", [False, True])
def test_a_period_is_as_training_of_these_layers_from_its_start(scan):
    """With an optimizer of their own: nothing of an earlier period is left in the state."""
    trees, step = switched(scan), stepper(scan, TX)
    for before, after, active in zip(trees, trees[1:], ((0, 2), (1,), (2, 1)), strict=False):
        alone, _ = run(step, *started(jpeft.unfreeze(jpeft.merge(before), targets="layers.*", layers=active)))
        chex.assert_trees_all_close(jpeft.merge(after), jpeft.merge(alone), rtol=1e-4, atol=1e-6)


def test_one_program_for_every_choice():
    """Of scanned layers; the switch is compiled once too."""
    step = stepper(True, TX, traces=1)
    traced = chex.assert_max_traces(lambda params, state, layers: switch(params, state, TX, layers=layers), 1)
    compiled = jax.jit(traced)
    params, state = started(jpeft.blocks(base(True), layers=[0, 1]))
    for choice in ([0, 1], [2, 0], [1, 2]):
        params, state = run(step, *compiled(params, state, jnp.array(choice)))
    eager = switched(True, ((0, 1), (2, 0), (1, 2)))[-1]
    chex.assert_trees_all_close(jpeft.merge(params), jpeft.merge(eager), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scan", [False, True])
def test_state_is_of_what_trains(scan):
    """Two moments of four bytes for each entry of the layers that train, and a count."""
    params, state = started(jpeft.blocks(base(scan), layers=[2]))
    size = sum(x.size for x in jax.tree.leaves(layer(params, 0)))
    for layers in ([0, 2], [1]):
        params, state = switch(params, state, TX, layers=layers)
        assert sum(x.nbytes for x in jax.tree.leaves(state)) == 4 + 8 * len(layers) * size
        assert jpeft.summary(params).trainable == len(layers) * size


def test_no_gradient_of_a_whole_stack():
    """The memory of a backward pass is that of the layers that train, and less than a stack of gradients."""
    deep = DecoderConfig(32, 64, 64, 16, 4, 2)
    model = Decoder(deep, scan=True, remat="full")
    shapes = jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]
    stack = sum(4 * x.size for x in jax.tree.leaves(shapes["layers"]))

    def temporary(make):
        trainable, frozen = jpeft.partition(jax.eval_shape(make, shapes))
        loss = lambda t, f: waves(jpeft.apply(model, {"params": jpeft.combine(t, f)}, IDS))
        memory = jax.jit(jax.grad(loss)).lower(trainable, frozen).compile().memory_analysis()
        return memory.temp_size_in_bytes / stack, memory.output_size_in_bytes / stack

    used, gradients = temporary(jpeft.blocks(layers=jnp.arange(2)))
    assert used < 0.7 and abs(gradients - 2 / 16) < 1e-3
    assert temporary(jpeft.unfreeze(targets="layers/.*"))[1] > 0.99


def grouped():
    schedule = optax.linear_schedule(1e-2, 0.0, 100)
    adam = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(schedule))
    return optax.partition({"block": adam, "rest": adam}, block_labels)


@pytest.mark.parametrize("scan", [False, True])
def test_what_trains_all_along_goes_on(scan):
    """Its moments, both schedules and its count; those of layers start anew, with theirs."""
    tx = grouped()
    free = jpeft.unfreeze(base(scan), targets=OUTSIDE)
    params, state = run(stepper(scan, tx), *started(jpeft.blocks(free, layers=[0, 1]), tx))
    params, after = switch(params, state, tx, layers=[1, 2])
    rest = lambda state: jax.tree.leaves(state.inner_states["rest"])
    chex.assert_trees_all_equal(rest(after), rest(state))
    assert len(rest(state)) == 8 and all(np.any(x) for x in rest(state))
    adam, schedule = after.inner_states["block"].inner_state
    assert adam.count == 0 and schedule.count == 2
    assert len(jax.tree.leaves(adam.mu)) == len(jax.tree.leaves(layer(params, 0))) * (1 if scan else 2)
    assert not any(np.any(x) for x in jax.tree.leaves((adam.mu, adam.nu)))


def test_a_shared_count_is_refused():
    params, state = started(jpeft.blocks(jpeft.unfreeze(base(True), targets=OUTSIDE), layers=[0]))
    with pytest.raises(ValueError, match=r"opt_state\[0\]\.count counts the steps of others too"):
        switch(params, state, TX, layers=[1])


@pytest.mark.parametrize("scan", [False, True])
def test_the_copy_that_trains_is_float32(scan):
    """Steps that bfloat16 would round away add up."""
    half = jax.tree.map(lambda x: jnp.ones(x.shape, jnp.bfloat16), base(scan))
    tx = optax.chain(optax.scale(0.0), optax.add_decayed_weights(-1e-3))  # x <- 0.999 x
    params, _ = run(stepper(scan, tx), *started(jpeft.blocks(half, layers=[1]), tx), 8)
    chex.assert_trees_all_equal_dtypes(jpeft.merge(params), half)
    rows = jax.tree.leaves(jpeft.partition(params)[0])
    assert all(x.dtype == jnp.float32 for x in rows)
    np.testing.assert_allclose(np.concatenate([x.ravel() for x in rows]), 0.999**8, rtol=1e-5)
    after = jpeft.blocks(params, layers=[0])
    assert all(np.all(x == jnp.bfloat16(0.999**8)) for x in jax.tree.leaves(layer(after, 1)))


def test_any_axis_and_several_stacks():
    """The stacked axis may be another one; of two stacks it is the layers of each."""
    w = {"encoder": {"layers": {"w": jax.random.normal(jax.random.key(0), (4, 3, 5))}}, "decoder": {}}
    w["decoder"] = {"layers": {"w": jax.random.normal(jax.random.key(1), (6, 2))}}
    params = jpeft.blocks(w, layers=[1], axis=1)
    chex.assert_trees_all_equal(jpeft.merge(params), w)
    doubled = jpeft.combine(jax.tree.map(lambda x: 2 * x, jpeft.partition(params)[0]), params)
    both = jpeft.merge(jpeft.blocks(doubled, layers=[0], axis=1))
    for name, x in (("encoder", w["encoder"]["layers"]["w"]), ("decoder", w["decoder"]["layers"]["w"])):
        np.testing.assert_array_equal(both[name]["layers"]["w"], x.at[:, 1].multiply(2))


@pytest.mark.parametrize("layers", [[], [0, 0], [3], [-1]])
def test_refuses_layers(layers):
    with pytest.raises(ValueError, match=r"name some of \[0, 1, 2\], each once"):
        jpeft.blocks(base(True), layers=layers)


@pytest.mark.parametrize("layer", [COUNT, -COUNT - 1])
def test_a_traced_layer_that_is_not_there_is_seen(layer):
    params = jax.jit(lambda n: jpeft.blocks(base(True), layers=n))(jnp.array([0, layer]))
    kernel = jpeft.merge(params)["layers"]["mlp"]["up"]["kernel"]
    assert np.isnan(kernel).any()


def test_refuses_trees():
    with pytest.raises(ValueError, match="`layers` cannot be traced"):
        jax.jit(lambda n: jpeft.blocks(base(False), layers=n))(jnp.array([0]))
    with pytest.raises(ValueError, match="keeps no base to nest these nodes in"):
        jpeft.blocks(jpeft.lora(base(True), targets={".*/up/kernel": "sio"}), layers=[0])


def test_layers_numbered_from_one_have_no_zeroth():
    with pytest.raises(ValueError, match=r"name some of \[1, 2\], each once"):
        jpeft.blocks({f"layer{n}": {"kernel": jnp.ones((2, 2))} for n in (1, 2)}, layers=[0])


@pytest.mark.parametrize("scan", [True, False])
def test_what_trains_can_be_donated(scan):
    params = jax.tree.map(jnp.copy, base(scan))
    trainable, frozen = jpeft.partition(jpeft.blocks(params, layers=[1]))
    jax.jit(lambda t, f: (jax.tree.map(jnp.add, t, t), f), donate_argnums=0)(trainable, frozen)
    assert not any(x.is_deleted() for x in jax.tree.leaves((params, frozen)))
