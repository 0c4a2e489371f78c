"""Nodes beside modules: in which order they act, and how the modules' own parameters take them in."""

import re
from collections.abc import Mapping
from typing import Any

from ._kernel import STACK, fold, stacked, unfold
from ._node import Additive, Affine, cast, rebox, value, widened


def beside(tree: Mapping[str, Any]) -> list[tuple[str, Additive]]:
    """The nodes beside a module, in the order in which they were attached: later ones act around earlier ones."""
    return sorted(((name, x) for name, x in tree.items() if isinstance(x, Additive)), key=lambda pair: number(pair[0]))


def number(name: str) -> int:
    """The number at the end of a node's name: 0 where there is none, as for the first beside a module."""
    return int((re.search(r"_(\d+)$", name) or [0, 0])[1])


def folded_in(node: Additive, own: Mapping[str, Any]) -> dict[str, Any]:
    """A module's own parameters, all of them arrays, with a node folded into them; in float32, and cast last.

    **Raises** `ValueError` with the reason, a relative clause, where that cannot be.
    """
    if not isinstance(node, Affine):
        raise ValueError("which acts on activations: it is no function of the weights")
    if "kernel" not in own or own.keys() - {"kernel", "bias"}:
        raise ValueError(f"whose module has no kernel and bias alone, but {sorted(own)}")
    kernel, bias = value(own["kernel"]), value(own.get("bias"))
    depth = node.axes.count(STACK)
    if len(node.axes) != kernel.ndim or STACK in node.axes[depth:]:
        raise ValueError(f"whose kernel of shape {kernel.shape} cannot have the axes {node.axes!r}")
    w = fold(widened(kernel), node.axes)
    shift = None if bias is None else widened(bias).reshape(*bias.shape[:depth], -1)
    w, shift = stacked(lambda n, w, b: n.merged(w, b), depth)(cast(node, w.dtype), w, shift)
    new = {"kernel": unfold(w, kernel.shape, node.axes).astype(kernel.dtype)}
    if bias is not None:
        new["bias"] = shift.reshape(bias.shape).astype(bias.dtype)
    return {name: rebox(x, new[name]) for name, x in own.items()}
