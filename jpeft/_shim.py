"""All that jpeft knows of JAX's internals: how to evaluate an equation of a jaxpr, and the rules of a `custom_vjp`.

And what has to be said to its compilers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend import core as jex


Literal = jex.Literal


def bind(eqn: Any, vals: list[Any]) -> list[Any]:
    """The outputs of `eqn`, with `vals` for its inputs."""
    params = eqn.primitive.get_bind_params(eqn.params)
    with eqn.ctx.manager:
        if isinstance(params, dict):
            out = eqn.primitive.bind(*vals, **params)
        else:  # before JAX 0.10: functions apart
            out = eqn.primitive.bind(*params[0], *vals, **params[1])
    return list(out) if eqn.primitive.multiple_results else [out]


def custom_vjp_rules(eqn: Any) -> tuple[Callable, Callable, Callable[[], list[int | None]]]:
    """The rules of a `custom_vjp_call`: `fwd(*inputs) -> residuals + outputs`, `bwd(*residuals, *cts) -> cotangents`.

    The third tells, once `fwd` has run, for every residual that `bwd` expects which input it is, or `None` for the next
    of those that `fwd` returned.
    """
    subfuns = eqn.primitive.get_bind_params(eqn.params)["subfuns"]
    rules, avals = subfuns[1:], [v.aval for v in eqn.invars]

    def fwd(*vals):
        return rules[0].call_wrapped(*(x for v in vals for x in (v, True)))

    def bwd(*vals):
        cts = zip(rules[1].call_wrapped(*vals), avals, strict=True)
        return [jnp.asarray(ct) if _is_array(ct) else jnp.zeros(a.shape, a.dtype) for ct, a in cts]

    return fwd, bwd, lambda: eqn.params["out_trees"]()[2]


def row_major(x: jax.Array) -> jax.Array:
    """`x`, laid out row by row: of a Fourier transform's result in another layout, XLA for CPU fails."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array)
