"""Targets: which parameters a method touches, and what their axes mean."""

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from . import places
from ._kernel import IN, OUT, STACK
from ._node import Additive, is_param, whole
from ._shared import SHARED


# A pattern, several, a predicate `(path, leaf) -> bool`, or patterns with the letters of the axes of what they match.
Targets = str | Sequence[str] | Mapping[str, str] | Callable[[str, Any], bool]

# A value for every target, or patterns with the value of what they match: the first match wins.
Option = Any

TABLE = places.EMBEDDINGS + "/(embedding|input_embedding)"
HEAD = places.LOGITS + "/kernel"


@dataclasses.dataclass(frozen=True)
class Site:
    """What a model does with one parameter, as `sites` found out."""

    path: str
    shape: tuple[int, ...]
    dtype: Any
    axes: str | None  # letters, where an operation that knows them consumes the parameter
    ops: tuple[str, ...]  # the operations that consume it
    flops: float  # of the products it enters, in one call

    @property
    def module(self) -> str:
        """The path of the module that owns the parameter."""
        return self.path.rpartition("/")[0]


@dataclasses.dataclass(frozen=True)
class Call:
    """What a module is called with and returns."""

    features_in: int  # the size of the last axis of its first argument
    features_out: int  # and of its (first) result
    stack: tuple[int, ...] | None  # the sizes of the first axes, over which it is stacked; `None`: of others
    shape: tuple[int, ...] = ()  # of its first argument


class Sites(dict[str, Site]):
    """`Site`s by path; `modules` holds a `Call` by path for the modules. As text, tables of both."""

    modules: dict[str, Call]

    def __init__(self, sites: Mapping[str, Site], modules: Mapping[str, Call]):
        super().__init__(sites)
        self.modules = dict(modules)

    def __str__(self):
        rows = [("path", "shape", "dtype", "axes", "operations", "GFLOP")]
        for s in self.values():
            ops, flops = " ".join(s.ops) or "-", f"{s.flops / 1e9:.3g}"
            rows.append((s.path, str(s.shape), str(s.dtype), s.axes or "?", ops, flops))
        found = [("module", "place", "in", "out", "stacked over")]
        for path, call in self.modules.items():
            place = next((name for name, pattern in places.NAMES.items() if re.fullmatch(pattern, path)), None)
            if place:
                stack = "?" if call.stack is None else " ".join(map(str, call.stack))
                found.append((path, place, str(call.features_in), str(call.features_out), stack))
        return _table(rows) + ("\n\n" + _table(found) if len(found) > 1 else "")


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def name_of(path: Sequence) -> str:
    """A key path as `layer_0/attn/query/kernel`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def sibling(name: str, other: str) -> str:
    """The name that the parameter `other` has, or would have, in the module of the parameter `name`."""
    return f"{name.rpartition('/')[0]}/{other}".lstrip("/")


def named_leaves(params: Any) -> dict[str, Any]:
    """Every parameter by name: an array, a box or a node. What stands beside parameters is not one."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_param)
    found = {name_of(path): leaf for path, leaf in leaves if not isinstance(leaf, Additive)}
    return {name: leaf for name, leaf in found.items() if not name.startswith(f"{SHARED}/")}


def no_match(patterns: Sequence[str], names: Sequence[str], what: str = "parameter") -> ValueError:
    """The error for patterns that match nothing: near-misses, and the names that do exist."""
    lines = []
    for pattern in patterns:
        plain = re.sub(r"[\\.*+?^$()\[\]|]+", "", pattern)
        near = [n for n in names if re.search(pattern, n)] or difflib.get_close_matches(plain, names, 3, 0.5)
        lines.append(f"{pattern!r} matches no {what}." + (f" Near: {', '.join(near[:3])}." if near else ""))
        heads = [head for head in places.HEADS if re.fullmatch(pattern, f"{head}/kernel")]
        tables = [n for n in names if re.fullmatch(TABLE, n)]
        if heads and tables and not re.fullmatch(pattern, "other/kernel"):
            lines[-1] += f" An output head that is tied to the embeddings is one parameter with them: {tables[0]}."
    names = [n for n in names if n]  # the model itself, as a module, has none
    lines.append(f"A pattern must match the whole name. There are {len(names)}: {', '.join(names[:8])}")
    return ValueError("\n".join(lines) + (", ..." if len(names) > 8 else "."))


def select(targets: Targets, names: Mapping[str, Any], what: str = "parameter") -> dict[str, str | None]:
    """The names that `targets` matches, each with the letters that `targets` gives it, if any.

    **Raises** `ValueError` for every pattern that matches no name, all at once.
    """
    if callable(targets):
        found = {name: None for name, x in names.items() if targets(name, x)}
        if not found:
            raise ValueError(f"The predicate picks no {what} of the {len(names)}: {', '.join(list(names)[:8])}, ...")
        return found
    patterns = {targets: None} if isinstance(targets, str) else targets
    patterns = patterns if isinstance(patterns, Mapping) else dict.fromkeys(patterns)
    idle = [p for p in patterns if not any(re.fullmatch(p, name) for name in names)]
    if idle or not patterns:
        raise no_match(idle, list(names), what)
    first = {name: next((p for p in patterns if re.fullmatch(p, name)), None) for name in names}
    return {name: patterns[p] for name, p in first.items() if p is not None}


def options(given: Mapping[str, Option], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The options of every name: those given as patterns are looked up, the first match wins.

    **Raises** `ValueError` for a pattern that matches nothing, and for a name that no pattern matches.
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for option, x in given.items():
        patterns = x if isinstance(x, Mapping) else {".*": x}
        idle = [p for p in patterns if not any(re.fullmatch(p, name) for name in names)]
        if idle:
            raise no_match(idle, list(names), f"target of the option `{option}`")
        for name in names:
            pattern = next((p for p in patterns if re.fullmatch(p, name)), None)
            if pattern is None:
                raise ValueError(f"`{option}` says nothing of the target {name!r}: end it with '.*': a default.")
            found[name][option] = patterns[pattern]
    return found


def one_of(option: str, given: Any, known: Iterable) -> None:
    """**Raises** `ValueError` for an option that is none of what is known."""
    if given not in (known := list(known)):
        raise ValueError(f"`{option}` is {given!r}: one of {', '.join(map(str, known))}.")


def kernels(params: Any, targets: Targets | None, sites: Sites | None) -> dict[str, str]:
    """The letters of the axes of every kernel that is targeted, by name. See `Targets` in the docs.

    **Raises** `ValueError` for a pattern that matches nothing, and for kernels whose axes nothing settles.
    """
    leaves = named_leaves(params)
    if targets is not None:
        found = select(targets, leaves)
    elif sites is not None:
        dots = [n for n, s in sites.items() if s.axes and any(op in ("dot_general", "ragged_dot") for op in s.ops)]
        found = {n: None for n in dots if n in leaves and not re.fullmatch(HEAD, n) and "gather" not in sites[n].ops}
    else:
        found = {n: None for n in leaves if n.rpartition("/")[2] == "kernel" and not re.fullmatch(HEAD, n)}
    if not found:
        raise no_match([r"(.*/)?kernel"], list(leaves))
    shapes = {n: whole(leaves[n]).shape for n in found}
    axes = {n: given or (sites[n].axes if sites and n in sites else None) for n, given in found.items()}
    axes = {n: given or ("io" if len(shapes[n]) == 2 else None) for n, given in axes.items()}
    unsettled = {n: shapes[n] for n, given in axes.items() if given is None}
    if unsettled:
        raise ValueError(_ambiguous(unsettled))
    return _fitting(leaves, axes)


def parameters(params: Any, targets: Targets | None, sites: Sites | None) -> dict[str, str]:
    """Letters for the axes of every parameter that is targeted, by name: for methods that act on entries one by one.

    Those need no more of axes than which are stacked: where nothing settles the others, they are called outputs. By
    default every floating-point parameter is targeted, but not the output head's.

    **Raises** `ValueError` for a pattern that matches nothing, for letters that do not fit, and for integers.
    """
    leaves = named_leaves(params)
    floating = {n: x for n, x in leaves.items() if jnp.issubdtype(whole(x).dtype, jnp.floating)}
    in_head = lambda name: re.fullmatch(HEAD, sibling(name, "kernel"))
    found = select(targets or (lambda name, _: not in_head(name)), floating)

    def letters(name, given):
        known = given or (sites[name].axes if sites and name in sites else None)
        call = sites.modules.get(name.rpartition("/")[0]) if sites else None
        stacked, ndim = len(call.stack or ()) if call else 0, len(whole(leaves[name]).shape)
        return known or ("io" if ndim == 2 and not stacked else STACK * stacked + OUT * (ndim - stacked))

    return _fitting(leaves, {n: letters(n, given) for n, given in found.items()})


def _fitting(leaves: Mapping[str, Any], axes: dict[str, str]) -> dict[str, str]:
    for n, given in axes.items():
        shape = whole(leaves[n]).shape
        if len(given) != len(shape) or set(given) - {IN, OUT, STACK}:
            raise ValueError(f"{n!r} has shape {shape}: its axes cannot be {given!r}. A letter an axis, of 'ios'.")
    return axes


def _ambiguous(shapes: Mapping[str, tuple[int, ...]]) -> str:
    rows = "\n".join(f"  {name}: {shape}" for name, shape in list(shapes.items())[:8])
    name, shape = next(iter(shapes.items()))
    return (
        f"Which axes of these kernels are inputs, and which outputs?\n{rows}\n"
        "Let the model tell:\n"
        '  sites = jpeft.sites(model, {"params": params}, *example_inputs)   # then pass sites=sites\n'
        "or say so, with one letter an axis, i(nput), o(utput) or s(tacked over layers or experts):\n"
        f"  targets={{{re.escape(name)!r}: {'?' * len(shape)!r}, ...}}   # such as 'ioo', 'iio' or 'sio'"
    )
