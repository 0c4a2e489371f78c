"""Priming: a few steps of full training, for what they change."""

from collections.abc import Callable, Iterable
from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from .._node import widened
from .._targets import Targets
from .._tree import Params
from ._run import Batch, Running, compiled, run
from ._values import filled, of_values, values_of, zeros


def prime(
    loss_fn: Callable[[Params, Batch], jax.Array],
    params: Params,
    batches: Iterable[Batch],
    *,
    optimizer: optax.GradientTransformation,
    targets: Targets | None = None,
    **running: Unpack[Running],
) -> Params:
    r"""What full training changes, $\theta - \theta_0$, after a step of the optimizer for every batch.

    Such changes tell which nodes FAR lets learn, and which entries the lottery-ticket sparse fine-tuning does. `params`
    stay what they are: what nodes stand for, such as a quantized kernel, is trained as if it were an array.

    **Arguments:**

    - `loss_fn`: `(params, batch)` to the loss of the batch, a number.
    - `optimizer`: an Optax one; it sees the parameters in float32.
    - `targets`: which parameters. By default every one of floating point but the output head's.
    - `running`: `progress`, `resume` and `save_every`. See the page on offline passes. Of another optimizer only its
      state can be told.

    **Returns** the parameters' nested structure with an array of a parameter's shape, in float32, for every target, and
    `None` elsewhere.

    **Raises** `ValueError` as `gradient_scores` does.
    """

    @compiled
    def step(carry, params, batch):
        changes, state = carry
        start = values_of(params, changes)
        changed = lambda w, change: widened(w) + change
        now = jax.tree.map(changed, start, changes)
        loss = lambda now: of_values(loss_fn, params, batch)(jax.tree.map(lambda w, x: x.astype(w.dtype), start, now))
        updates, state = optimizer.update(jax.grad(loss)(now), state, now)
        return jax.tree.map(jnp.add, changes, updates), state

    start = zeros(params, targets)
    state = optimizer.init(jax.tree.map(widened, values_of(params, start)))
    state = jax.tree.map(jnp.copy, state)  # some keep the parameters, and a carry's arrays are given away
    changes, _ = run(step, (start, state), params, batches, what="prime", options={}, **running)
    return filled(params, changes)
