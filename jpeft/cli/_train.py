"""The step, the evaluation, and the loop around them."""

import contextlib
import math
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jpeft
from jpeft.cli._arguments import Arguments
from jpeft.cli._data import Batch, Texts
from jpeft.cli._errors import UserError
from jpeft.cli._run import Run


class State(NamedTuple):
    """What a step changes."""

    trainable: Any
    opt_state: optax.OptState


class Interrupted(Exception):
    """Ctrl-C, once the state is saved."""

    def __init__(self, step: int, directory: Path):
        super().__init__(f"saved after step {step}")
        self.directory = directory


def learning_rate(arguments: Arguments) -> optax.Schedule:
    """A linear rise to the peak over the warmup, then a decay to 0 at the last step."""
    warmup = int(arguments.warmup * arguments.steps)

    def schedule(step: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        step = jnp.float32(step)
        left = 1.0 - (step - warmup) / (arguments.steps - warmup)
        decay = left if arguments.schedule == "linear" else 0.5 - 0.5 * jnp.cos(math.pi * left)
        return arguments.learning_rate * jnp.where(step < warmup, (step + 1) / (warmup + 1), decay)

    return schedule


def optimizer(arguments: Arguments) -> optax.GradientTransformation:
    """AdamW that decays matrices alone, on gradients clipped by their norm."""
    matrices = lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)
    adamw = optax.adamw(learning_rate(arguments), weight_decay=arguments.weight_decay, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(arguments.clip), adamw)


def make_step(model: nn.Module, tx: optax.GradientTransformation, label_smoothing: float) -> Callable:
    """`(state, frozen, batch) -> (state, loss)`; the state that goes in is used up."""

    def loss(trainable: Any, frozen: Any, batch: Batch) -> jax.Array:
        logits = jpeft.apply(model, {"params": jpeft.combine(trainable, frozen)}, batch.tokens, batch.mask)
        wanted = optax.smooth_labels(jax.nn.one_hot(batch.labels, logits.shape[1]), label_smoothing)
        return optax.softmax_cross_entropy(logits, wanted).mean()

    @partial(jax.jit, donate_argnums=0)
    def step(state: State, frozen: Any, batch: Batch) -> tuple[State, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(state.trainable, frozen, batch)
        updates, opt_state = tx.update(gradients, state.opt_state, state.trainable)
        return State(optax.apply_updates(state.trainable, updates), opt_state), value

    return step


def make_evaluation(model: nn.Module, texts: Texts, size: int) -> Callable:
    """`(trainable, frozen) -> (accuracy, loss)` over all texts, `size` at a time."""

    @jax.jit
    def sums(trainable: Any, frozen: Any, batch: Batch) -> jax.Array:
        logits = jpeft.apply(model, {"params": jpeft.combine(trainable, frozen)}, batch.tokens, batch.mask)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        right = (jnp.argmax(logits, axis=1) == batch.labels).astype(jnp.float32)
        return jnp.stack([right, losses]) @ batch.weights

    def evaluate(trainable: Any, frozen: Any) -> tuple[float, float]:
        total = sum(np.asarray(sums(trainable, frozen, batch), np.float64) for _, batch in texts.all_batches(size))
        accuracy, loss = total / len(texts)
        return float(accuracy), float(loss)

    return evaluate


def features(encoder: nn.Module, params: Any, texts: Texts, size: int) -> np.ndarray:
    """Features (texts, d): the mean of the encoder's outputs at every text's tokens."""

    @jax.jit
    def pooled(params: Any, batch: Batch) -> jax.Array:
        weights = batch.mask / jnp.maximum(jnp.sum(batch.mask, axis=1, keepdims=True), 1)
        return jnp.einsum("bl,bld->bd", weights, encoder.apply({"params": params}, batch.tokens, batch.mask))

    found = np.zeros((len(texts), encoder.config.hidden_size), np.float32)
    for rows, batch in texts.all_batches(size):
        found[rows] = pooled(params, batch)[: len(rows)]
    return found


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
    run: Run, start: int, state: State, *, frozen: Any, texts: Texts, arguments: Arguments,
    step_fn: Callable, evaluate: Callable, report: Callable[[dict[str, Any]], None],
) -> State:  # fmt: skip
    """Make the steps after `start`; log, evaluate and save on the way.

    Raises `Interrupted` after a Ctrl-C, and a UserError for a loss that is not finite.
    """
    schedule = learning_rate(arguments)
    with interruptions() as interrupted:
        for done in range(start + 1, arguments.steps + 1):
            batch = texts.train_batch(done - 1, arguments.batch_size, arguments.seed)
            state, loss = step_fn(state, frozen, batch)
            if not math.isfinite(loss):
                raise UserError(f"the loss is {loss} at step {done}; try a lower --learning-rate")
            report(run.log(step=done, loss=float(loss), learning_rate=float(schedule(done - 1))))
            last = done == arguments.steps
            if last or done % arguments.eval_every == 0:
                accuracy, loss = evaluate(state.trainable, frozen)
                report(run.log(step=done, accuracy=accuracy, evaluation_loss=loss))
            stop = interrupted()
            if last or stop or done % arguments.save_every == 0:
                run.save(done, state)
            if stop:
                raise Interrupted(done, run.directory)
    return state
