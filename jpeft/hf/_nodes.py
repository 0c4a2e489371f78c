"""Nodes of single matrices, and the node of the parameter that they make up: layers, experts, joined kernels."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from .._node import Node, Role
from .._shared import Ref, refs
from ._joints import JOINTS, Joint
from ._modules import Module


def whole_node(given: Mapping[Module, Node], together: Sequence[Module]) -> Node:
    """The node at a parameter, of those at its parts; `together` are all of its parts.

    **Raises** `ValueError` with the reason where there is none.
    """
    places: dict[tuple[int, ...], list[Module]] = {}
    for m in together:
        places.setdefault(m.index, []).append(m)
    kind = type(next(iter(given.values()))).__name__
    joined = [_side_by_side([given.get(m) for m in parts], parts) for parts in places.values()]
    if len(joined) > 1:
        joined = _alike(joined)
    first, axes = joined[0], together[0].axes
    if not together[0].index:
        return _with_axes(first, axes)
    sizes = tuple(max(index[n] for index in places) + 1 for n in range(len(together[0].index)))
    others = {_static(node) for node in joined}
    if len(others) > 1 or math.prod(sizes) != len(joined):
        raise ValueError(f"its layers have different kinds of {kind}, and the tree has them in one stack")
    try:
        node = jax.tree.map(lambda *xs: np.stack(xs).reshape(*sizes, *xs[0].shape), *joined)
    except ValueError:
        raise ValueError(f"its layers have {kind} of different shapes, and the tree has them in one stack") from None
    return _with_axes(node, axes)


def _with_axes(node: Any, axes: str) -> Any:
    return node.replace(axes=axes) if "axes" in node.roles else node


def _static(node: Node) -> tuple:
    return type(node), tuple(refs(node)), tuple(sorted((k, str(x)) for k, x in node.parts(Role.STATIC).items()))


def _side_by_side(nodes: list[Any], parts: Sequence[Module]) -> Any:
    """The node of kernels that are joined along their outputs."""
    there = [node for node in nodes if node is not None]
    if len(parts) == 1 or not there:
        return nodes[0]
    if joint := _joint(there):
        return joint.join(nodes, parts)
    names = ", ".join(m.name for m in parts)
    raise ValueError(f"the tree has {names} as one kernel, of which there is no {type(there[0]).__name__} that is "
                     "theirs. Load the model without `fused`")  # fmt: skip


def _alike(nodes: list[Any]) -> list[Any]:
    """Nodes of one shape for all layers, where there is an exact way."""
    there = [node for node in nodes if node is not None]
    if joint := _joint(there):
        return joint.fill(nodes)
    if len(there) == len(nodes):
        return nodes
    raise ValueError(
        f"the adapter has {type(there[0]).__name__} at some of the layers alone, and the tree has them in one "
        "stack. Load the model without `scan`"
    )


def _joint(nodes: list[Any]) -> Joint | None:
    """How these nodes are joined; `None` where they cannot be, or are of several classes."""
    kinds = {type(node) for node in nodes}
    return JOINTS.get(kinds.pop()) if len(kinds) == 1 else None


def part_of(node: Any, m: Module) -> Any:
    """The node of a part of a parameter, in NumPy and without base; `None` where it does nothing and cannot learn.

    **Raises** `ValueError` with the reason where there is none.
    """
    bare = node.replace(base=None) if "base" in node.roles else node
    of_index = lambda x: x if isinstance(x, Ref) else np.asarray(x)[m.index]
    part = jax.tree.map(of_index, bare, is_leaf=lambda x: isinstance(x, Ref))
    joint = JOINTS.get(type(node))
    if m.at is not None:
        if joint is None:
            raise ValueError(
                f"{type(node).__name__} at a kernel that the checkpoint has as several: LoRA alone can be divided"
            )
        part = joint.divide(part, slice(*m.at))
    part = _with_axes(part, m.axes[len(m.index) :])
    return joint.trim(part) if m.index and joint else part
