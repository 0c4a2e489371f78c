"""AdapterDrop: no adapters in the first layers."""

from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp

from .._tree import Params, nodes_of, transform
from ..selective._layers import Place, places
from ._hidden import Hidden


@transform
def adapter_drop(params: Params, *, layers: int | jax.Array, key: jax.Array | None = None) -> Params:
    """The tree without the effect of the adapters, `Hidden` nodes such as those of `bottleneck`, of the first layers.

    Rücklé et al., [AdapterDrop: On the Efficiency of Adapters in Transformers](https://arxiv.org/abs/2010.11918),
    EMNLP 2021.

    **Arguments:**

    - `layers`: of how many layers, in every stack of them. An `int` removes the nodes of numbered layers, and nothing
      is left to compute. Otherwise, and where layers are stacked, what the adapters add is multiplied by zero: the
      structure stays, and another number in an array is no new trace.
    - `key`: not used.

    **Raises** `ValueError` where there are no such nodes, or none in layers, for a negative `int`, and, with every
    path, for nodes that nothing can be multiplied into.
    """
    nodes = nodes_of(params, Hidden, "bottleneck")
    own = {path: next(iter(jax.tree.leaves(node)), None) for path, node in nodes.items()}  # none where all are shared
    at = places(own, None, 0)
    gone = {}
    if isinstance(layers, int):
        if layers < 0:
            raise ValueError(f"Adapters are dropped from the first layers: `layers` is {layers}.")
        gone = {path for path, place in at.items() if place.layer is not None and place.layer < layers}
        at = {path: place for path, place in at.items() if place.layer is None}
    if stuck := [f"  {path}: {type(nodes[path]).__name__}" for path in at if not nodes[path].scaled_by]:
        raise ValueError("Nothing can be multiplied into these, so that they would add zero:\n" + "\n".join(stuck))
    return _without(params, gone, {path: _switched(nodes[path], place, layers) for path, place in at.items()})


def _switched(node: Hidden, place: Place, layers: int | jax.Array) -> Hidden:
    """The node, which adds nothing in the first layers."""
    stays = (jnp.arange(place.count) if place.layer is None else jnp.array(place.layer)) >= layers
    kept = lambda x: jnp.where(stays.reshape(*stays.shape, *[1] * (x.ndim - stays.ndim)), x, jnp.zeros_like(x))
    return node.replace(**{name: kept(getattr(node, name)) for name in node.scaled_by})


def _without(tree: Params, gone: Collection[str], new: Mapping[str, Hidden], path: str = "") -> Params:
    """The tree without the nodes at the paths that are `gone`, and with those that are `new`."""
    if not isinstance(tree, Mapping):
        return tree
    inside = {k: f"{path}{k}" for k in tree if f"{path}{k}" not in gone}
    made = {k: new[at] if at in new else _without(tree[k], gone, new, f"{at}/") for k, at in inside.items()}
    emptied = lambda k: isinstance(made[k], Mapping) and not made[k] and tree[k]  # a module without parameters
    return {k: x for k, x in made.items() if not emptied(k)}
