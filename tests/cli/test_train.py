import json
import math
import os
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from jpeft.cli._arguments import Arguments
from jpeft.cli._errors import UserError
from jpeft.cli._run import BEST, STATE, Run
from jpeft.cli._train import State, interruptions, learning_rate, optimizer, train
from jpeft.optim import skip_nonfinite


@pytest.fixture
def arguments():
    return Arguments(steps=20, warmup=0.25, learning_rate=2.0, weight_decay=0.1, clip=1.0)


SHAPES = [("linear", 2.0 * 5 / 15), ("cosine", 1.0 + math.cos(math.pi * 10 / 15))]


@pytest.mark.parametrize(("schedule", "middle"), SHAPES)
def test_learning_rate_rises_and_decays(arguments, schedule, middle):
    rate = learning_rate(Arguments(**vars(arguments) | {"schedule": schedule}))
    np.testing.assert_allclose([rate(n) for n in range(6)], [2.0 * n / 6 for n in (1, 2, 3, 4, 5, 6)], rtol=1e-6)
    np.testing.assert_allclose(rate(15), middle, rtol=1e-6)
    assert all(rate(n) > rate(n + 1) > 0 for n in range(5, 19))
    np.testing.assert_allclose(rate(20), 0, atol=1e-7)


def test_a_constant_rate_rises_and_stays():
    rate = learning_rate(Arguments(steps=20, warmup=0.25, learning_rate=2.0, schedule="constant"))
    np.testing.assert_allclose([rate(n) for n in (0, 5, 12, 19)], [2.0 / 6, 2.0, 2.0, 2.0], rtol=1e-6)


def test_first_step_is_adams(arguments):
    """Adam's first update is the sign of the gradient; the decay adds 0.1 of matrices, and the clip changes neither."""
    tx = optimizer(arguments)
    params = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, 3.0)}
    gradients = jax.tree.map(lambda x: -100.0 * x, params)
    updates, _ = tx.update(gradients, tx.init(params), params)
    peak = 2.0 / 6
    np.testing.assert_allclose(updates["kernel"], peak * (1 - 0.1 * 3.0), rtol=1e-5)
    np.testing.assert_allclose(updates["bias"], peak, rtol=1e-5)


@pytest.fixture
def before():
    """Python's own handler, which a process that was started in the background does not have."""
    outer = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, outer)


def test_interruption_is_told_once_and_then_lets_go(before):
    with interruptions() as interrupted:
        assert not interrupted()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


class Rows:
    """Batches whose one number is that of the step."""

    def train_batch(self, step, size, seed):
        return np.full((size, 1), step, np.float32)


@pytest.fixture
def loop(tmp_path):
    """Runs the loop with evaluations and losses as given; what trains is the number of steps that were finite."""
    run, tx = Run(tmp_path), skip_nonfinite(optax.identity())

    def go(evaluations, *, loss=lambda step: 1.0, start=0, **options):
        given = Arguments(learning_rate=1.0, batch_size=2, accumulate=3, eval_every=2, save_every=100, **options)
        task = SimpleNamespace(train=Rows(), amount=lambda batch: batch.size)
        scripted = iter(evaluations)

        def step(state, frozen, batch):
            assert batch.shape == (3, 2, 1)
            value = loss(int(batch[0, 0, 0]) + 1)
            updates, opt_state = tx.update(jnp.float32(1), state.opt_state, value=jnp.float32(value))
            return State(optax.apply_updates(state.trainable, updates), opt_state), value

        initial = jnp.float32(start)
        return train(
            run, start, State(initial, tx.init(initial)), frozen=None, task=task, arguments=given, step_fn=step,
            evaluate=lambda *_: {"evaluation_loss": next(scripted)}, report=lambda row, amount: None,
        ).trainable  # fmt: skip

    return run, go


def test_patience_ends_a_run_and_keeps_the_best(loop):
    run, go = loop
    assert go([9.0, 5.0, 6.0, 5.0, 4.0], steps=100, patience=2) == 6
    assert [row["step"] for row in run.evaluations()] == [0, 2, 4, 6]
    assert run.best()["step"] == 2
    assert run.read(BEST, jnp.float32(0)) == (2, 2)
    assert go([], steps=100, patience=2, start=6) == 6  # once more ended, it does not go on


def test_without_patience_a_run_makes_all_steps(loop):
    run, go = loop
    assert go([1.0, 2.0, 3.0, 4.0], steps=5) == 5
    assert [row["step"] for row in run.evaluations()] == [0, 2, 4, 5]
    assert not (run.directory / BEST).exists()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_steps_that_are_not_finite_are_skipped_and_counted(loop, bad):
    run, go = loop
    assert go([1.0, 1.0, 1.0, 1.0], steps=6, loss=lambda step: bad if step in (2, 3, 5) else 1.0) == 3
    metrics = (run.directory / "metrics.jsonl").read_text()
    written = [json.loads(line, parse_constant=pytest.fail) for line in metrics.splitlines()]
    assert written == run.rows
    rows = [row for row in run.rows if "loss" in row]
    assert [row["loss"] for row in rows] == [1.0, None, None, 1.0, None, 1.0]
    assert [row.get("skipped") for row in rows] == [None, 1, 2, None, 1, None]
    rate = learning_rate(Arguments(learning_rate=1.0, steps=6))
    made = [row["learning_rate"] for row in rows if "skipped" not in row]
    np.testing.assert_allclose(made, [rate(n) for n in range(3)], rtol=1e-6)


def test_too_many_in_a_row_end_a_run_with_what_was_good(loop):
    run, go = loop
    loss = lambda step: math.nan if step in (2, 5, 6, 7) else 1.0
    with pytest.raises(UserError, match=r"3 steps in a row, the last of them step 7\. .* step 4 left") as e:
        go([1.0] * 4, steps=9, skip_limit=3, loss=loss)
    like = State(jnp.float32(0), skip_nonfinite(optax.identity()).init(jnp.float32(0)))
    step, state = run.read(STATE, like)
    assert (step, state.trainable, state.opt_state.skipped, state.opt_state.in_a_row) == (7, 3, 4, 3)
    (batch,) = load_file(run.directory / "batch-7.safetensors").values()
    np.testing.assert_array_equal(batch, Rows().train_batch(6, 6, 0))
    assert str(run.directory / "state") in str(e.value) and "batch-7.safetensors" in str(e.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_evaluation_that_is_not_finite_is_never_the_best(loop, bad):
    run, go = loop
    assert go([bad, 2.0, bad, 1.0, bad, bad], steps=100, patience=2) == 10
    assert run.best()["step"] == 6
    assert run.read(BEST, jnp.float32(0)) == (6, 6)
    assert [row["evaluation_loss"] for row in run.evaluations()] == [None, 2.0, None, 1.0, None, None]


def test_no_finite_evaluation_is_no_best(loop):
    run, go = loop
    assert go([math.nan, -math.inf], steps=100, patience=2) == 2
    assert run.best() is None and not (run.directory / BEST).exists()
