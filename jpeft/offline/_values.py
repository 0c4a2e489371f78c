"""Parameters as plain arrays by name: what a pass differentiates with respect to, whatever stands in their places."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._node import is_param, rebox, value, whole
from .._shared import resolve
from .._targets import Targets, name_of, named_leaves, parameters
from .._tree import Params, shared_arrays, strip
from ._run import Batch


Values = dict[str, jax.Array]


def zeros(params: Params, targets: Targets | None) -> Values:
    """Zeros in float32 for every entry of the parameters that are targeted."""
    leaves = named_leaves(params)
    return {name: jnp.zeros(whole(leaves[name]).shape) for name in parameters(params, targets, None)}


def values_of(params: Params, names: Iterable[str]) -> Values:
    """The parameters of these names as they are; what nodes stand for, in the places of nodes."""
    leaves, shared = named_leaves(params), shared_arrays(params)
    return {name: value(resolve(leaves[name], shared)) for name in names}


def of_values(loss_fn: Callable, params: Params, batch: Batch) -> Callable[[Values], Any]:
    """The loss of a batch as a function of some parameters: they are plain arrays in it, and the rest as it was."""

    def loss(values):
        one = lambda path, x: rebox(x, values[name]) if (name := name_of(path)) in values else x
        return loss_fn(jax.tree_util.tree_map_with_path(one, params, is_leaf=is_param), batch)

    return loss


def filled(params: Params, found: Mapping[str, Any]) -> Params:
    """The parameters' nested structure, with what was found in their places, and `None` elsewhere."""
    return jax.tree_util.tree_map_with_path(lambda path, _: found.get(name_of(path)), strip(params), is_leaf=is_param)
