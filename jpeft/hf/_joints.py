"""The classes of nodes that can be joined and divided without a change of what they do."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._node import Node
from ..additive._beft import BEFT
from ..reparam._lora import LoRA
from ._modules import Module


@dataclasses.dataclass(frozen=True)
class Joint:
    """How nodes of one class are joined and divided. A module without a node has `None` for it.

    **Fields:**

    - `join`: `(nodes, modules) ->` the node of kernels that are joined along their outputs.
    - `fill`: `nodes ->` nodes of one shape for all layers. **Raises** `ValueError` where there are none.
    - `divide`: `(node, outputs) ->` the node of some of the outputs.
    - `trim`: `node ->` the node without what `fill` has added; `None` if that is all.
    """

    join: Callable[[list[Any], Sequence[Module]], Node]
    fill: Callable[[list[Any]], list[Node]]
    divide: Callable[[Any, slice], Node]
    trim: Callable[[Any], Node | None]


def wider(*dtypes: Any) -> np.dtype:
    """The type that holds the numbers of all, however strict JAX is to be with types."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def _join_lora(nodes: list[LoRA | None], parts: Sequence[Module]) -> LoRA:
    """[A1 A2 ...] and a block-diagonal B: ranks add up. Zeros are where one of the kernels has no node."""
    there = [node for node in nodes if node is not None]
    scale = there[0].scale
    rounded = [np.float32] * any(node.scale != scale for node in there)  # times a quotient of scales
    dtype = wider(*rounded, *(x.dtype for node in there for x in (node.a, node.b)))
    ranks = [0 if node is None else node.a.shape[-1] for node in nodes]
    b = np.zeros((sum(ranks), sum(m.outputs for m in parts)), dtype)
    row = column = 0
    for node, rank, m in zip(nodes, ranks, parts, strict=True):
        if node is not None:
            b[row : row + rank, column : column + m.outputs] = node.b * np.asarray(node.scale / scale, dtype)
        row, column = row + rank, column + m.outputs
    return there[0].replace(a=np.concatenate([node.a.astype(dtype) for node in there], axis=-1), b=b)


def _fill_lora(nodes: list[LoRA | None]) -> list[LoRA]:
    """With zeros up to the largest rank.

    A column of A and a row of B that are both zero have no gradient: they stay zero in training.
    """
    there = [node for node in nodes if node is not None]
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


def _divide_lora(node: LoRA, outputs: slice) -> LoRA:
    """A is that of all outputs."""
    return node.replace(b=node.b[..., outputs])


def _trim_lora(node: LoRA) -> LoRA | None:
    """Without the ranks at which A and B are both zero."""
    others = tuple(range(node.a.ndim - 2))
    alive = np.any(node.a != 0, axis=(*others, -2)) | np.any(node.b != 0, axis=(*others, -1))
    return node.replace(a=node.a[..., alive], b=node.b[..., alive, :]) if alive.any() else None


def _join_beft(nodes: list[BEFT | None], parts: Sequence[Module]) -> BEFT:
    first = next(node for node in nodes if node is not None)
    none = lambda m: np.zeros(m.outputs, first.bias.dtype)
    scaled = lambda node: node.bias if node.scale == first.scale else node.bias * (node.scale / first.scale)
    biases = [none(m) if node is None else scaled(node) for node, m in zip(nodes, parts, strict=True)]
    return first.replace(bias=np.concatenate(biases))


def _fill_beft(nodes: list[BEFT | None]) -> list[BEFT]:
    first = next(node for node in nodes if node is not None)
    return [first.replace(bias=np.zeros_like(first.bias)) if node is None else node for node in nodes]


def _divide_beft(node: BEFT, outputs: slice) -> BEFT:
    return node.replace(bias=node.bias[..., outputs])


JOINTS: dict[type[Node], Joint] = {
    LoRA: Joint(_join_lora, _fill_lora, _divide_lora, _trim_lora),
    BEFT: Joint(_join_beft, _fill_beft, _divide_beft, lambda node: node),
}
