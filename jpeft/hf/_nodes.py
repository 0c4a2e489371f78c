"""Nodes of single matrices, and the node of the parameter that they make up: layers, experts, joined kernels."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from .._node import Node, Role
from .._shared import Ref
from ..additive._beft import BEFT
from ..reparam._lora import LoRA
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
    return type(node), tuple(sorted((k, str(x)) for k, x in node.parts(Role.STATIC).items()))


def _side_by_side(nodes: list[Any], parts: Sequence[Module]) -> Any:
    """The node of kernels that are joined along their outputs."""
    if len(parts) == 1:
        return nodes[0]
    there = [node for node in nodes if node is not None]
    if not there:
        return None
    kinds = {type(node) for node in there}
    if kinds == {LoRA}:
        return _lora_side_by_side(nodes, parts)
    if kinds == {BEFT}:
        none = lambda m: np.zeros(m.outputs, there[0].bias.dtype)
        biases = [none(m) if node is None else node.bias for node, m in zip(nodes, parts, strict=True)]
        return there[0].replace(bias=np.concatenate(biases))
    names = ", ".join(m.name for m in parts)
    raise ValueError(f"the tree has {names} as one kernel, of which there is no {there[0].__class__.__name__} that is "
                     "theirs. Load the model without `fused`")  # fmt: skip


def _lora_side_by_side(nodes: list[LoRA | None], parts: Sequence[Module]) -> LoRA:
    """[A1 A2 ...] and a block-diagonal B: ranks add up. Zeros are where one of the kernels has no node."""
    there = [node for node in nodes if node is not None]
    scale, dtype = there[0].scale, there[0].b.dtype
    ranks = [0 if node is None else node.a.shape[-1] for node in nodes]
    b = np.zeros((sum(ranks), sum(m.outputs for m in parts)), dtype)
    row = column = 0
    for node, rank, m in zip(nodes, ranks, parts, strict=True):
        if node is not None:
            b[row : row + rank, column : column + m.outputs] = node.b * np.asarray(node.scale / scale, dtype)
        row, column = row + rank, column + m.outputs
    return there[0].replace(a=np.concatenate([node.a for node in there], axis=-1), b=b)


def _alike(nodes: list[Any]) -> list[Any]:
    """Nodes of one shape for all layers, where there is an exact way: zeros for LoRA and its biases.

    A column of A and a row of B that are both zero have no gradient: they stay zero in training.
    """
    there = [node for node in nodes if node is not None]
    kinds = {type(node) for node in there}
    if len(there) == len(nodes) and kinds != {LoRA}:
        return nodes
    if kinds == {BEFT}:
        return [there[0].replace(bias=np.zeros_like(there[0].bias)) if x is None else x for x in nodes]
    if kinds != {LoRA}:
        raise ValueError(
            f"the adapter has {there[0].__class__.__name__} at some of the layers alone, and the tree has them in one "
            "stack. Load the model without `scan`"
        )
    if len({node.scale for node in there}) > 1:
        raise ValueError(
            "its layers have different scales, and the tree has them in one stack. Load the model without `scan`"
        )
    rank = max(node.a.shape[-1] for node in there)
    return [_padded(there[0], 0, rank) if node is None else _padded(node, node.a.shape[-1], rank) for node in nodes]


def _padded(node: LoRA, own: int, rank: int) -> LoRA:
    """The node with the first `own` of its ranks, and zeros up to `rank`."""
    grow = lambda x, axis: np.pad(x, [(0, rank - own if n == axis else 0) for n in range(x.ndim)])
    return node.replace(a=grow(node.a[..., :own], node.a.ndim - 1), b=grow(node.b[..., :own, :], node.b.ndim - 2))


def part_of(node: Any, m: Module) -> Any:
    """The node of a part of a parameter, in NumPy and without base; `None` where it does nothing and cannot learn.

    **Raises** `ValueError` with the reason where there is none.
    """
    bare = node.replace(base=None) if "base" in node.roles else node
    of_index = lambda x: x if isinstance(x, Ref) else np.asarray(x)[m.index]
    part = jax.tree.map(of_index, bare, is_leaf=lambda x: isinstance(x, Ref))
    if m.at is not None:
        part = _columns(part, m)
    part = _with_axes(part, m.axes[len(m.index) :])
    return _living(part) if m.index and isinstance(part, LoRA) else part


def _columns(node: Any, m: Module) -> Any:
    """The node of some of the outputs: A is that of all."""
    if isinstance(node, LoRA):
        return node.replace(b=node.b[..., slice(*m.at)])
    if isinstance(node, BEFT):
        return node.replace(bias=node.bias[..., slice(*m.at)])
    raise ValueError(f"{type(node).__name__} at a kernel that the checkpoint has as several: LoRA alone can be divided")


def _living(node: LoRA) -> LoRA | None:
    """Without the ranks at which A and B are both zero, as those are that a layer without a node was filled with."""
    others = tuple(range(node.a.ndim - 2))
    alive = np.any(node.a != 0, axis=(*others, -2)) | np.any(node.b != 0, axis=(*others, -1))
    if not alive.any():
        return None
    return node.replace(a=node.a[..., alive], b=node.b[..., alive, :])
