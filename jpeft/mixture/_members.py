"""LoRAs that were tuned one by one on one base, side by side."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .._node import Reparam
from .._tree import Params
from ..algebra._matched import matched
from ..reparam._lora import LoRA


class Members(NamedTuple):
    """The LoRAs that stand at one kernel, of every tree one; they have the scale of the first."""

    a: jax.Array  # (stack..., tree, in, rank)
    b: jax.Array  # (stack..., tree, rank, out)
    scale: float
    axes: str


def members(trees: Sequence[Params]) -> tuple[Params, dict[str, Members]]:
    """The base of trees that `lora` has made, and their LoRAs by path.

    Ranks are filled up with zeros to the largest, and what differs of scales is multiplied into $B$.

    **Raises** `ValueError`, with every path, for what is no LoRA, for paths where some trees have one and others not,
    and for different bases.
    """
    found = matched(trees, _fault)
    short = {path: sorted(set(range(len(trees))) - set(nodes)) for path, nodes in found.nodes.items()}
    if any(short.values()):
        raise ValueError(
            "These trees have LoRAs at different kernels:\n"
            + "\n".join(f"  {path}: none in trees {missing}" for path, missing in short.items() if missing)
            + "\nTune all of them with the same `targets`."
        )
    return found.base, {path: _side_by_side(list(nodes.values())) for path, nodes in found.nodes.items()}


def _fault(node: Reparam) -> str | None:
    if not isinstance(node, LoRA):
        return f"it is a {type(node).__name__}, and LoRAs are mixed here."
    return "it stands on another node: merge one of them first." if isinstance(node.base, Reparam) else None


def _side_by_side(nodes: list[LoRA]) -> Members:
    first, rank = nodes[0], max(x.a.shape[-1] for x in nodes)

    def filled(x, axis):
        return jnp.pad(x, [(0, rank - n if axis == d - x.ndim else 0) for d, n in enumerate(x.shape)])

    a = [filled(x.a, -1) for x in nodes]
    b = [filled(x.b if x.scale == first.scale else x.b * (x.scale / first.scale), -2) for x in nodes]
    return Members(jnp.stack(a, first.depth), jnp.stack(b, first.depth), first.scale, first.axes)
