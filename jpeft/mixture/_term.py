"""Terms that are added to what a module makes of its kernel, and are no function of that kernel alone."""

import abc
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

from .._kernel import IN, OUT, STACK, folded, stacked
from .._node import Additive, Static, whole
from .._operands import dropout as drop
from .._operands import fold_in
from .._targets import Option, Sites, Targets, kernels, named_leaves, options
from .._tree import Params, default, modules, place
from ..additive._hidden import Hidden


class Term(Hidden):
    """$y' = y + f(x)$ beside the module that multiplies $x$ with a kernel, to which $f$ is `(in, out)`, too."""

    at: Static[Literal["output", "input", "norm"]] = "input"
    axes: Static[str] = "io"  # the letters of the kernel's axes
    outputs: Static[tuple[int, ...] | None] = None  # the sizes of its output axes, where it has several

    @abc.abstractmethod
    def term(self, x: jax.Array, dropped: jax.Array, key: jax.Array | None) -> jax.Array:
        """$f(x)$: `(..., in)` -> `(..., out)`. Factors see `x` after dropout, what weighs them `x` itself."""

    def change(self, h, key):
        x = h.reshape(*h.shape[: h.ndim - self.axes.count(IN)], -1)
        y = self.term(x, drop(x, self.dropout, key), fold_in(key, 1))
        return y if self.outputs is None else y.reshape(*y.shape[:-1], *self.outputs)


def attach_terms(
    params: Params,
    new: Callable,
    *,
    name: str,
    targets: Targets | None,
    sites: Sites | None,
    key: jax.Array | None,
    **given: Option,
) -> Params:
    """Put the `Term` that `new(key, features_in, features_out, **options)` returns beside every targeted kernel.

    **Raises** `ValueError` as `kernels` and `place_terms` do.
    """
    leaves, axes = named_leaves(params), kernels(params, targets, sites)
    chosen = options(given, list(axes))
    terms = {}
    for path, k in zip(axes, jax.random.split(default(key), len(axes)), strict=True):
        *stack, features_in, features_out = folded(whole(leaves[path]).shape, axes[path])
        make = lambda k, i=features_in, o=features_out, path=path: new(k, i, o, **chosen[path])
        node = stacked(make, len(stack))(jax.random.split(k, stack) if stack else k)
        terms[path] = node.replace(axes=axes[path])
    return place_terms(params, terms, name, sites)


def place_terms(params: Params, terms: Mapping[str, Term], name: str, sites: Sites | None = None) -> Params:
    """The tree with every term beside the module that owns the kernel at its path.

    **Raises** `ValueError`, with every path, for kernels that are not what their module multiplies its input with.
    """
    leaves, owners = named_leaves(params), modules(params)
    shapes = {path: whole(leaves[path]).shape for path in terms}
    faults = {path: _fault(path, shapes[path], term.axes, owners, sites) for path, term in terms.items()}
    if any(faults.values()):
        raise ValueError(
            "A mixture stands beside a module, and adds to what that makes of its input and one kernel:\n"
            + "\n".join(f"  {path} {shapes[path]}: {why}" for path, why in faults.items() if why)
            + "\nLeave these out of `targets`."
        )
    at = {}
    for path, term in terms.items():
        sizes = tuple(n for n, c in zip(shapes[path], term.axes, strict=True) if c == OUT)
        at[path.rpartition("/")[0]] = term.replace(outputs=sizes if len(sizes) > 1 else None)
    return place(params, at, name)


def _fault(path: str, shape: tuple[int, ...], axes: str, owners: Mapping[str, Any], sites: Sites | None) -> str | None:
    owner = path.rpartition("/")[0]
    others = [n for n, x in owners[owner].items() if not isinstance(x, Additive) and n != path.rpartition("/")[2]]
    if set(others) - {"bias"}:
        return f"its module has {', '.join(others)}, too"
    depth, size = axes.count(STACK), lambda c: math.prod(n for n, a in zip(shape, axes, strict=True) if a == c)
    if STACK in axes[depth:]:
        return f"the stacked axes of {axes!r} are not the first"
    if sites is None or owner not in sites.modules:
        return None
    if any(op != "dot_general" for op in sites[path].ops):
        return f"it is used by {', '.join(sites[path].ops)}"
    call, inner = sites.modules[owner], axes.count(IN)
    if call.stack != shape[:depth] or math.prod(call.shape[len(call.shape) - inner :]) != size(IN):
        return f"its module, stacked over {call.stack}, is called with {call.shape}"
    return None
