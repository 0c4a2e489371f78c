"""Gradients of a loss with respect to what parameters are, over batches: Fisher information and sums of gradients."""

from collections.abc import Callable, Iterable
from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from .._targets import Targets
from .._tree import Params
from ._run import Batch, Running, compiled, run
from ._values import Values, filled, of_values, values_of, zeros


def fisher(
    loss_fn: Callable[[Params, Batch], jax.Array],
    params: Params,
    batches: Iterable[Batch],
    *,
    expected: bool = False,
    targets: Targets | None = None,
    **running: Unpack[Running],
) -> Params:
    r"""The diagonal of the Fisher information: $F_i = \frac1N \sum_x (\partial_i \log p(y | x))^2$ of $N$ examples.

    The squares are of the gradients of single examples, whatever the size of a batch, and are taken one after another.
    Gradients are those with respect to the value of a parameter, whatever stands in its place: a quantized kernel's, or
    what adapters have made of it.

    **Arguments:**

    - `loss_fn`: `(params, batch)` to the loss of a batch of one example, a number. What is squared is its gradient.
    - `batches`: pytrees whose first axis is examples, of any number and size.
    - `expected`: the expectation over the model's own predictions, $\sum_c p_c\,(\partial_i \log p_c)^2$, in place of
      labels. `loss_fn` then returns $\log p$ of one example, `(classes,)`.
    - `targets`: which parameters. By default every one of floating point but the output head's.
    - `running`: `progress`, `resume` and `save_every`. See the page on offline passes.

    **Returns** the parameters' nested structure with an array of a parameter's shape, in float32, for every target, and
    `None` elsewhere.

    **Raises** `ValueError` if there are no batches, for targets that match nothing, and for a `resume` of another pass.

    Sung et al., [Training Neural Networks with Fixed Sparse Masks](https://arxiv.org/abs/2111.09839), NeurIPS 2021.
    """
    squares = _expected_squares if expected else _squares

    @compiled
    def step(carry, params, batch):
        def one(total, example):
            example = jax.tree.map(lambda x: x[None], example)
            return _added(total, squares(of_values(loss_fn, params, example), values_of(params, total))), None

        total, count = carry
        examples = len(jax.tree.leaves(batch)[0])
        return jax.lax.scan(one, total, batch)[0], count + examples

    start = zeros(params, targets), jnp.int32(0)
    total, count = run(step, start, params, batches, what="fisher", options={"expected": expected}, **running)
    return filled(params, jax.tree.map(lambda x: x / count.astype(x.dtype), total))


def gradient_scores(
    loss_fn: Callable[[Params, Batch], jax.Array],
    params: Params,
    batches: Iterable[Batch],
    *,
    squared: bool = False,
    clip: float | None = None,
    targets: Targets | None = None,
    **running: Unpack[Running],
) -> Params:
    r"""The sum over batches of the gradients of their losses, $\sum_t g_t$, with parameters that do not change.

    **Arguments:** those of `fisher`, but `expected`, and

    - `loss_fn`: `(params, batch)` to the loss of the batch, a number.
    - `squared`: $\sum_t g_t^2$ instead.
    - `clip`: the global norm, over all targets, that each batch's gradient is clipped to before.

    **Returns** and **raises** what `fisher` does. The sum has signs: a score is its size.

    Fu et al., [On the Effectiveness of Parameter-Efficient Fine-Tuning](https://arxiv.org/abs/2211.15583), AAAI 2023,
    whose released code scores parameters by $|\sum_t g_t|$.
    """
    power = jnp.square if squared else lambda g: g

    @compiled
    def step(total, params, batch):
        grads = jax.grad(of_values(loss_fn, params, batch))(values_of(params, total))
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        if clip is not None:
            grads, _ = optax.clip_by_global_norm(clip).update(grads, optax.EmptyState())
        return _added(total, jax.tree.map(power, grads))

    how = {"what": "gradient_scores", "options": {"squared": squared, "clip": clip}}
    return filled(params, run(step, zeros(params, targets), params, batches, **how, **running))


def _squares(loss: Callable[[Values], jax.Array], values: Values) -> Values:
    return jax.tree.map(lambda g: jnp.square(g.astype(jnp.float32)), jax.grad(loss)(values))


def _expected_squares(log_probabilities: Callable[[Values], jax.Array], values: Values) -> Values:
    found, pull = jax.vjp(log_probabilities, values)
    if found.ndim != 1:
        raise ValueError(f"With `expected`, `loss_fn` returns log p of one example, (classes,), not {found.shape}.")

    def of_class(total, one):
        p, pick = one
        return _added(total, jax.tree.map(lambda g: p * jnp.square(g.astype(jnp.float32)), pull(pick)[0])), None

    start = jax.tree.map(lambda x: jnp.zeros(x.shape), values)
    probabilities = jnp.exp(found.astype(jnp.float32))
    return jax.lax.scan(of_class, start, (probabilities, jnp.eye(len(found), dtype=found.dtype)))[0]


def _added(total: Values, more: Values) -> Values:
    return jax.tree.map(jnp.add, total, more)
