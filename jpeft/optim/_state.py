"""The state of an optimizer, where what it belongs to changes between two steps."""

from collections.abc import Callable
from typing import Any

import jax
import optax


def map_moments(fn: Callable, state: Any, trainable: Any, *rest: Any) -> Any:
    """The state with `fn(moment, *others)` in place of every array in trees that are built as `trainable` and `rest`.

    Parts of such a tree that Optax has masked out, as `optax.partition` does, stay so.
    """
    alike = lambda x: _alike(x, trainable)
    one = lambda moment, *others: moment if _masked(moment) else fn(moment, *others)
    of_tree = lambda tree: jax.tree.map(one, tree, *rest, is_leaf=_masked)
    return jax.tree.map(lambda x: of_tree(x) if alike(x) else x, state, is_leaf=alike)


def _masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _alike(x: Any, trainable: Any) -> bool:
    leaves, structure = jax.tree.flatten(x, is_leaf=_masked)
    try:
        parts = structure.flatten_up_to(trainable)
    except ValueError:
        return False
    is_array = lambda part: jax.tree_util.all_leaves([part])
    fits = all(_masked(leaf) or is_array(part) for leaf, part in zip(leaves, parts, strict=True))
    return fits and structure.num_nodes > 1
