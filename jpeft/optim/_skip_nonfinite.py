"""A guard around an optimizer: steps that are not finite never happened."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._inner import lenient


class NonFiniteError(FloatingPointError):
    """Too many steps in a row were not finite."""


class SkipNonfiniteState(NamedTuple):
    """The state of `skip_nonfinite`."""

    inner: Any
    skipped: jax.Array  # int32, as the next
    in_a_row: jax.Array


def skip_nonfinite(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    r"""Skip every step with a NaN or an infinity in it, for ever: updates of zero, and the state of `inner` as it was.

    For the loss $\ell$, the gradients $g$, and what `inner` makes of them, updates $u$ and a new state $s'$:

    $$(u, s') \text{ where } \ell, g, u \text{ and } s' \text{ are finite, and otherwise } (0, s).$$

    So parameters and state keep every bit, whatever the weight decay and the momentum. What was infinite in the state
    $s$ may be so in $s'$. Skipped steps are counted, in all and in a row. `optax.apply_if_finite` looks at gradients
    alone, and applies them after so many in a row; here it is `check_finite` that ends a run.

    The loss is optional: `tx.update(grads, opt_state, trainable, value=loss)`. All extra arguments go on to `inner`.

    It must see what all devices have summed up: inside `jax.shard_map`, reduce the gradients before.

    **Arguments:**

    - `inner`: an optimizer. `optax.MultiSteps` belongs inside, for one bad microbatch not to spoil those before it.
    """
    inner = lenient(inner)

    def init(params):
        return SkipNonfiniteState(inner.init(params), skipped=jnp.int32(0), in_a_row=jnp.int32(0))

    def update(updates, state, params=None, **extra):
        given = _finite((extra.get("value"), updates))
        updates = _where(given, updates, _nothing(updates))  # LAPACK may never come back from the SVD of a NaN
        new, new_inner = inner.update(updates, state.inner, params, **extra)
        ok = given & _finite(new) & _stays_finite(state.inner, new_inner)
        count = lambda n: jnp.where(ok, n, optax.safe_increment(n))
        return _where(ok, new, _nothing(new)), SkipNonfiniteState(
            inner=_where(ok, new_inner, state.inner),
            skipped=count(state.skipped),
            in_a_row=jnp.where(ok, 0, count(state.in_a_row)),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def check_finite(opt_state: optax.OptState, *, limit: int) -> None:
    """Raise once `limit` steps in a row were skipped. It waits for the step: call it where the loss is read.

    **Arguments:**

    - `opt_state`: a state, anywhere in which there is one of `skip_nonfinite`.

    **Raises** `NonFiniteError` with the counts, and `ValueError` for a state without one and a limit less than 1.
    """
    is_guard = lambda x: isinstance(x, SkipNonfiniteState)
    guards = [x for x in jax.tree.leaves(opt_state, is_leaf=is_guard) if is_guard(x)]
    if not guards or limit < 1:
        raise ValueError(
            f"{len(guards)} states of `jpeft.optim.skip_nonfinite`, and a limit of {limit}: at least one of each. "
            "Make the state by `tx = jpeft.optim.skip_nonfinite(tx)` and `tx.init(trainable)`."
        )
    most = lambda name: max(int(np.max(getattr(guard, name))) for guard in guards)
    if most("in_a_row") >= limit:
        raise NonFiniteError(
            f"{most('in_a_row')} steps in a row had a loss, gradients or updates that are not finite; "
            f"{most('skipped')} steps in all. They changed nothing: parameters and state are those of the last finite "
            "step. Look at the batches, or lower the learning rate."
        )


def _where(condition: jax.Array, tree: Any, other: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), tree, other)


def _nothing(updates: Any) -> Any:
    """Updates by which no parameter changes a bit: -0.0 + 0.0 would be 0.0."""
    return jax.tree.map(lambda x: -jnp.zeros_like(x), updates)


def _finite(tree: Any) -> jax.Array:
    """Whether every number is."""
    return _all(jnp.isfinite(x) for x in jax.tree.leaves(tree) if _is_float(x))


def _stays_finite(old: Any, new: Any) -> jax.Array:
    """Whether every number is that was: a state may start from infinity, as a smallest loss does."""
    pairs = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    return _all(jnp.isfinite(y) | ~jnp.isfinite(x) for x, y in pairs if _is_float(x))


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _all(truths: Iterable[jax.Array]) -> jax.Array:
    return jnp.all(jnp.array([jnp.all(x) for x in truths], bool))
