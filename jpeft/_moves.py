"""Operations that only move a kernel about: what becomes of its `View`.

A rule takes the engine, the equation, and its inputs with a `View` among them. It returns the outputs, or `None` where
the view's value is needed.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._view import View


def _one(view: View | None) -> list[View] | None:
    return None if view is None else [view]


def _transpose(engine, eqn, vals):
    return _one(vals[0].relayout(vals[0].layout.transpose(eqn.params["permutation"])))


def _reshape(engine, eqn, vals):
    """Of a reshape, a squeeze, and a broadcast that only adds axes of size one."""
    shape = eqn.outvars[0].aval.shape
    if not isinstance(vals[0], View) or any(isinstance(v, View) for v in vals[1:]):
        return None
    permutes = eqn.primitive.name == "reshape" and eqn.params["dimensions"]
    if permutes or np.prod(shape) != np.prod(vals[0].layout.shape):
        return None
    return _one(vals[0].relayout(vals[0].layout.reshape(shape)))


def _cast(engine, eqn, vals):
    return _one(vals[0].astype(eqn.params["new_dtype"]))


def _same(engine, eqn, vals):
    return list(vals)


def _barrier(engine, eqn, vals):
    """A barrier for every array that the views are made of."""
    leaves, tree = jax.tree.flatten(vals)
    return tree.unflatten(eqn.primitive.bind(*leaves, **eqn.params))


def _constraint(engine, eqn, vals):
    return [vals[0].replace(constraint=eqn.params["sharding"])]


def _elementwise(engine, eqn, vals):
    """An operation on a device's copy of the parameter: the same on every array that it is made of."""
    cast = lambda x: eqn.primitive.bind(x, **eqn.params)
    outs = [jax.tree.map(cast, v) if isinstance(v, View) else cast(v) for v in vals]
    return outs if not eqn.primitive.multiple_results else None


def _scale(engine, eqn, vals):
    """A product with, or division by, a scalar."""
    ranks = [v.aval.ndim for v in eqn.invars]
    dividing = eqn.primitive.name == "div"
    view, scalar = reversed(vals) if ranks[1] else vals
    if all(ranks) or (dividing and ranks[1]):
        return None
    if not isinstance(view, View) or not jnp.issubdtype(view.dtype, jnp.floating):
        return None
    scalar = jnp.asarray(*engine.formed([scalar], eqn.primitive.name))
    return [view.times(1 / scalar if dividing else scalar)]


def _cut(shape, new) -> int | None:
    """The one dimension whose size differs."""
    differs = [d for d, (n, m) in enumerate(zip(shape, new, strict=True)) if n != m]
    return differs[0] if len(differs) == 1 else None


def _part(engine: Any, view: View, d: int | None, size: int, cut: Callable) -> View | None:
    part = None if d is None else view.part(cut, d, size)
    if part is not None and size == 1:
        engine.record.axis(view, d, "s")
    return part


def _slice(engine, eqn, vals):
    view, start, strides = vals[0], eqn.params["start_indices"], eqn.params["strides"]
    size = eqn.outvars[0].aval.shape
    d = _cut(view.layout.shape, size)
    if d is None or any(s != 1 for s in strides or ()):
        return None
    cut = lambda x, k: jax.lax.slice_in_dim(x, start[d], start[d] + size[d], axis=k)
    return _one(_part(engine, view, d, size[d], cut))


def _dynamic_slice(engine, eqn, vals):
    view, *start = vals
    if not isinstance(view, View) or any(isinstance(v, View) for v in start):
        return None
    d = _cut(view.layout.shape, size := eqn.params["slice_sizes"])
    cut = lambda x, k: jax.lax.dynamic_slice_in_dim(x, start[d], size[d], axis=k)
    return None if d is None else _one(_part(engine, view, d, size[d], cut))


def _split(engine, eqn, vals):
    view, sizes, d = vals[0], [int(n) for n in eqn.params["sizes"]], eqn.params["axis"]
    parts = []
    for n, size in enumerate(sizes):
        cut = functools.partial(jax.lax.slice_in_dim, start_index=sum(sizes[:n]), limit_index=sum(sizes[: n + 1]))
        parts.append(_part(engine, view, d, size, lambda x, k, cut=cut: cut(x, axis=k)))
    return None if None in parts else parts


RULES: dict[str, Callable[[Any, Any, list[Any]], list[Any] | None]] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _reshape,
    "broadcast_in_dim": _reshape,
    "convert_element_type": _cast,
    "copy": _same,
    "copy_p": _same,
    "name": _same,
    "optimization_barrier": _barrier,
    "sharding_constraint": _constraint,
    "pvary": _same,  # what consumes it makes it vary
    "pcast": _elementwise,
    "mul": _scale,
    "div": _scale,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "split": _split,
}
