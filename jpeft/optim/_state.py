"""The state of an optimizer, where what it belongs to changes between two steps."""

from collections.abc import Callable
from typing import Any

import jax


def map_moments(fn: Callable[[Any], Any], state: Any, trainable: Any) -> Any:
    """The state with `fn(tree)` in place of every tree in it that is built as `trainable` is, such as a moment."""
    structure = jax.tree.structure(trainable)
    alike = lambda x: jax.tree.structure(x) == structure
    return jax.tree.map(lambda x: fn(x) if alike(x) else x, state, is_leaf=alike)
