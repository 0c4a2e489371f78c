"""The step, the evaluation, and the loop around them."""

import contextlib
import math
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jpeft
from jpeft.cli._arguments import Arguments
from jpeft.cli._errors import UserError
from jpeft.cli._run import BEST, STATE, Row, Run
from jpeft.cli._task import Task
from jpeft.optim import skip_nonfinite


class State(NamedTuple):
    """What a step changes."""

    trainable: Any
    opt_state: optax.OptState


class Interrupted(Exception):
    """Ctrl-C, once the state is saved."""

    def __init__(self, step: int, directory: Path):
        super().__init__(f"saved after step {step}")
        self.directory = directory


# By how much of the way to the last step is left.
SCHEDULES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda left: left,
    "cosine": lambda left: 0.5 - 0.5 * jnp.cos(math.pi * left),
    "constant": jnp.ones_like,
}


def learning_rate(arguments: Arguments) -> optax.Schedule:
    """A linear rise to the peak over the warmup, then the decay, by default to 0 at the last step."""
    warmup, decayed = int(arguments.warmup * arguments.steps), SCHEDULES[arguments.schedule]

    def schedule(step: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        step = jnp.float32(step)
        decay = decayed(1.0 - (step - warmup) / (arguments.steps - warmup))
        return arguments.learning_rate * jnp.where(step < warmup, (step + 1) / (warmup + 1), decay)

    return schedule


def optimizer(arguments: Arguments) -> optax.GradientTransformationExtraArgs:
    """AdamW that decays matrices alone, on gradients clipped by their norm; it skips what is not finite."""
    matrices = lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)
    adamw = optax.adamw(learning_rate(arguments), weight_decay=arguments.weight_decay, mask=matrices)
    return skip_nonfinite(optax.chain(optax.clip_by_global_norm(arguments.clip), adamw))


def make_step(task: Task, tx: optax.GradientTransformationExtraArgs) -> Callable:
    """`(state, frozen, batch) -> (state, loss)`; the state that goes in is used up.

    The arrays of `batch` are (microbatches, rows, ...). The loss is the mean over all that counts in any of them, so
    that it does not matter how the rows are shared out.
    """

    def share(trainable: Any, frozen: Any, batch: Any, total: jax.Array) -> jax.Array:
        return task.loss(jpeft.combine(trainable, frozen), batch) / total

    @partial(jax.jit, donate_argnums=0)
    def step(state: State, frozen: Any, batch: Any) -> tuple[State, jax.Array]:
        total = jnp.maximum(jnp.sum(batch.weights), 1.0)

        def add(sums: Any, microbatch: Any) -> tuple[Any, None]:
            found = jax.value_and_grad(share)(state.trainable, frozen, microbatch, total)
            return jax.tree.map(jnp.add, sums, found), None

        zeros = jnp.float32(0), jax.tree.map(jnp.zeros_like, state.trainable)
        (value, gradients), _ = jax.lax.scan(add, zeros, batch)
        updates, opt_state = tx.update(gradients, state.opt_state, state.trainable, value=value)
        return State(optax.apply_updates(state.trainable, updates), opt_state), value

    return step


def make_evaluation(task: Task, size: int) -> Callable:
    """`(trainable, frozen) -> metrics` of all that there is to evaluate on, `size` rows at a time."""

    @jax.jit
    def sums(trainable: Any, frozen: Any, batch: Any) -> dict[str, jax.Array]:
        return task.scores(jpeft.combine(trainable, frozen), batch)

    def evaluate(trainable: Any, frozen: Any) -> Row:
        total, weight = Counter(), 0.0
        for _, batch in task.evaluation.all_batches(size):
            total.update({name: float(x) for name, x in sums(trainable, frozen, batch).items()})
            weight += float(np.sum(batch.weights))
        return task.metrics({name: x / weight for name, x in total.items()})

    return evaluate


@contextlib.contextmanager
def interruptions() -> Iterator[Callable[[], bool]]:
    """Tells whether there was a Ctrl-C. The next one interrupts at once."""
    happened = False

    def handle(*_: Any) -> None:
        nonlocal happened
        happened = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: happened
    finally:
        signal.signal(signal.SIGINT, before)


def train(
    run: Run, start: int, state: State, *, frozen: Any, task: Task, arguments: Arguments,
    step_fn: Callable, evaluate: Callable, report: Callable[[Row, int], None],
) -> State:  # fmt: skip
    """Make the steps after `start`; log, evaluate and save on the way.

    Raises `Interrupted` after a Ctrl-C, and a UserError after too many steps in a row that were not finite: what they
    left as it was is saved, and the last batch of them is written down.
    """
    schedule, last = learning_rate(arguments), arguments.steps
    size, parts = arguments.batch_size, arguments.accumulate
    apart = lambda x: x.reshape(parts, size, *x.shape[1:])

    def judge() -> None:
        report(run.log(step=done, **evaluate(state.trainable, frozen)), 0)
        if arguments.patience and run.stale() == 0:
            run.save(BEST, done, state.trainable)

    def finished() -> bool:
        return done >= last or (arguments.patience is not None and run.stale() >= arguments.patience)

    done = start
    with interruptions() as interrupted:
        if not start:
            judge()
        while not finished():
            batch = task.train.train_batch(done, parts * size, arguments.seed)
            done += 1
            state, loss = step_fn(state, frozen, jax.tree.map(apart, batch))
            skipped, in_a_row = int(state.opt_state.skipped), int(state.opt_state.in_a_row)
            counts = {"skipped": in_a_row} if in_a_row else {}
            rate = float(schedule(done - skipped - 1))
            report(run.log(step=done, loss=float(loss), learning_rate=rate, **counts), task.amount(batch))
            if in_a_row >= arguments.skip_limit:
                run.save(STATE, done, state)
                raise UserError(_gave_up(run, done, in_a_row, batch))
            if done == last or done % arguments.eval_every == 0:
                judge()
            stop = interrupted()
            if finished() or stop or done % arguments.save_every == 0:
                run.save(STATE, done, state)
            if stop:
                raise Interrupted(done, run.directory)
    return state


def _gave_up(run: Run, step: int, in_a_row: int, batch: Any) -> str:
    """What to tell after so many steps in a row that were not finite, the last of which was with `batch`."""
    file = run.keep_batch(step, batch)
    return (
        f"the loss or its gradient was not finite at {in_a_row} steps in a row, the last of them step {step}. They "
        f"changed nothing: {run.directory / STATE} holds the state that step {step - in_a_row} left. The last batch is "
        f"in {file}. Try a lower --learning-rate, or go on with the next batch: jpeft finetune --resume --output "
        f"{run.directory}"
    )
