"""Values from inside a computation, beside what it returns: out of layers that are scanned or rematerialized, too."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from .. import _shim


def tap(x: jax.Array, name: str) -> jax.Array:
    """`x`, which `tapped` finds by the name."""
    return checkpoint_name(x, name)


def tapped(fn: Callable[[], Any], name: str) -> tuple[Any, list[jax.Array]]:
    """What `fn()` returns, and every value that it taps under `name`; those in a loop stacked, its steps first.

    **Raises** `ValueError` for a tap inside of what runs nobody knows how often, such as `jax.lax.cond`.
    """
    static: dict[str, Any] = {}

    def arrays():
        out, static["tree"] = jax.tree.flatten(fn())
        static["fixed"] = [None if hasattr(x, "dtype") else x for x in out]
        return [x for x in out if hasattr(x, "dtype")]

    closed = jax.make_jaxpr(arrays)()
    outs, taps = _run(closed.jaxpr, closed.consts, [], name)
    rest = iter(outs)
    return jax.tree.unflatten(static["tree"], [next(rest) if x is None else x for x in static["fixed"]]), taps


def _run(jaxpr: Any, consts: list[Any], args: list[Any], name: str) -> tuple[list[Any], list[jax.Array]]:
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    read = lambda v: v.val if isinstance(v, _shim.Literal) else env[v]
    taps: list[jax.Array] = []
    for eqn in jaxpr.eqns:
        vals, found = [read(v) for v in eqn.invars], []
        if _is_tap(eqn, name):
            outs, found = vals, vals
        elif not any(_holds(inner, name) for inner in _inside(eqn)):
            outs = _shim.bind(eqn, vals)
        elif eqn.primitive.name in RULES:
            outs, found = RULES[eqn.primitive.name](eqn.params, vals, name)
        else:
            raise ValueError(f"What is inside of a `{eqn.primitive.name}` does not come out of it: {name!r}.")
        env.update(zip(eqn.outvars, outs, strict=True))
        taps += found
    return [read(v) for v in jaxpr.outvars], taps


def _is_tap(eqn: Any, name: str) -> bool:
    return eqn.primitive.name == "name" and eqn.params["name"] == name


def _inside(eqn: Any) -> Iterator[Any]:
    """The jaxprs that an equation holds."""
    for x in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
        if hasattr(x, "eqns"):
            yield getattr(x, "jaxpr", x)


def _holds(jaxpr: Any, name: str) -> bool:
    return any(_is_tap(e, name) or any(_holds(inner, name) for inner in _inside(e)) for e in jaxpr.eqns)


def _call(params, vals, name):
    inner = params["call_jaxpr"] if "call_jaxpr" in params else params["jaxpr"]
    return _run(inner.jaxpr, inner.consts, vals, name)


def _remat(params, vals, name):
    run = lambda *vals: _run(params["jaxpr"], (), list(vals), name)
    return jax.checkpoint(run, prevent_cse=params["prevent_cse"], policy=params["policy"])(*vals)


def _scan(params, vals, name):
    consts, states = _shim.scan_counts(params)
    carried = consts + states
    inner = params["jaxpr"]

    def body(carry, xs):
        outs, taps = _run(inner.jaxpr, inner.consts, [*vals[:consts], *carry, *xs], name)
        return outs[:states], (outs[states:], taps)

    how = {option: params[option] for option in ("length", "reverse", "unroll")}
    carry, (ys, taps) = jax.lax.scan(body, vals[consts:carried], vals[carried:], **how)
    return [*carry, *ys], taps


RULES: dict[str, Callable] = {
    "jit": _call, "pjit": _call, "closed_call": _call,
    "checkpoint": _remat, "remat": _remat, "remat2": _remat, "scan": _scan,
}  # fmt: skip
