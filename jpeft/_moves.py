"""Operations that only move a kernel about: what becomes of its `View`.

A rule takes the equation, its inputs with a `View` among them, and `axis(view, d, letter)` to tell what a dimension is.
It returns the outputs, or `None` where the view's value is needed.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._view import View


Axis = Callable[[View, int, str], None]


def _one(view: View | None) -> list[View] | None:
    return None if view is None else [view]


def _transpose(eqn, vals, axis: Axis):
    return _one(vals[0].relayout(vals[0].layout.transpose(eqn.params["permutation"])))


def _reshape(eqn, vals, axis: Axis):
    """Of a reshape, a squeeze, and a broadcast that only adds axes of size one."""
    shape = eqn.outvars[0].aval.shape
    if not isinstance(vals[0], View) or any(isinstance(v, View) for v in vals[1:]):
        return None
    if np.prod(shape) != np.prod(vals[0].layout.shape) or eqn.params.get("dimensions") and eqn.primitive.name == "reshape":
        return None
    return _one(vals[0].relayout(vals[0].layout.reshape(shape)))


def _cast(eqn, vals, axis: Axis):
    return _one(vals[0].astype(eqn.params["new_dtype"]))


def _same(eqn, vals, axis: Axis):
    return list(vals)


def _constraint(eqn, vals, axis: Axis):
    return [vals[0].replace(constraint=eqn.params["sharding"])]


def _elementwise(eqn, vals, axis: Axis):
    """An operation on a device's copy of the parameter: the same on every array that it is made of."""
    cast = lambda x: eqn.primitive.bind(x, **eqn.params)
    outs = [jax.tree.map(cast, v) if isinstance(v, View) else cast(v) for v in vals]
    return outs if not eqn.primitive.multiple_results else None


def _scale(eqn, vals, axis: Axis):
    """A product with, or division by, a scalar."""
    view, other = vals if isinstance(vals[0], View) else reversed(vals)
    if isinstance(other, View) or jnp.ndim(other) or not jnp.issubdtype(view.dtype, jnp.floating):
        return None
    if eqn.primitive.name == "div":
        if not isinstance(vals[0], View):
            return None
        other = 1 / jnp.asarray(other)
    return [view.times(jnp.asarray(other))]


def _cut(shape, new) -> int | None:
    """The one dimension whose size differs."""
    differs = [d for d, (n, m) in enumerate(zip(shape, new, strict=True)) if n != m]
    return differs[0] if len(differs) == 1 else None


def _part(view: View, d: int | None, size: int, cut: Callable, axis: Axis):
    part = None if d is None else view.part(cut, d, size)
    if part is not None:
        axis(view, d, "s")
    return part


def _slice(eqn, vals, axis: Axis):
    view, start, strides = vals[0], eqn.params["start_indices"], eqn.params["strides"]
    size = eqn.outvars[0].aval.shape
    d = _cut(view.layout.shape, size)
    if d is None or strides is not None and any(s != 1 for s in strides):
        return None
    cut = lambda x, k: jax.lax.slice_in_dim(x, start[d], start[d] + size[d], axis=k)
    return _one(_part(view, d, size[d], cut, axis))


def _dynamic_slice(eqn, vals, axis: Axis):
    view, *start = vals
    if not isinstance(view, View) or any(isinstance(v, View) for v in start):
        return None
    d = _cut(view.layout.shape, size := eqn.params["slice_sizes"])
    cut = lambda x, k: jax.lax.dynamic_slice_in_dim(x, start[d], size[d], axis=k)
    return None if d is None else _one(_part(view, d, size[d], cut, axis))


def _split(eqn, vals, axis: Axis):
    view, sizes, d = vals[0], [int(n) for n in eqn.params["sizes"]], eqn.params["axis"]
    parts = []
    for n, size in enumerate(sizes):
        cut = functools.partial(jax.lax.slice_in_dim, start_index=sum(sizes[:n]), limit_index=sum(sizes[: n + 1]))
        parts.append(_part(view, d, size, lambda x, k, cut=cut: cut(x, axis=k), axis))
    return None if None in parts else parts


RULES: dict[str, Callable[[Any, list[Any], Axis], list[Any] | None]] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _reshape,
    "broadcast_in_dim": _reshape,
    "convert_element_type": _cast,
    "copy": _same,
    "copy_p": _same,
    "name": _same,
    "optimization_barrier": _same,
    "sharding_constraint": _constraint,
    "pvary": _elementwise,
    "pcast": _elementwise,
    "mul": _scale,
    "div": _scale,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "split": _split,
}
