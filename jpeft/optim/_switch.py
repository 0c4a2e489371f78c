"""From some layers that train to others, with the optimizer's state of what trains alone."""

from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.tree_util import GetAttrKey

from .._node import is_node
from .._shared import SHARED, refs
from .._targets import name_of
from .._tree import Params, nodes_of, partition
from ..selective._blocks import Block, blocks


def switch(
    params: Params,
    opt_state: optax.OptState,
    tx: optax.GradientTransformation,
    *,
    layers: Sequence[int] | jax.Array,
    pattern: str | None = None,
    axis: int = 0,
) -> tuple[Params, optax.OptState]:
    """`jpeft.blocks` with other `layers`, and the state of the optimizer `tx` for them.

    The layers that trained keep what they have become. The moments of those that do now start anew, and so does the
    count of steps that goes with moments of layers alone; moments of all else that trains, and the counts of schedules,
    go on. Where layers are scanned over and there are as many as before, no shape changes: this can be compiled, and
    the training step is not compiled again.

    **Arguments:**

    - `params`, `opt_state`: of `jpeft.blocks`, trained or not, and of `tx`.
    - `layers`, `pattern`, `axis`: as for `jpeft.blocks`.

    **Raises** `ValueError` as `jpeft.blocks` does, and where layers and other parameters that train share a count of
    steps: moments that start anew with the old count would not be corrected for their bias, and steps be several times
    too long. `optax.partition` with `block_labels` gives each a count of its own.
    """
    params = blocks(params, layers=layers, pattern=pattern, axis=axis)
    trainable, _ = partition(params)
    return params, _carried(opt_state, tx.init(trainable), trainable)


def block_labels(trainable: Params) -> Params:
    """`"block"` for every array that `jpeft.blocks` lets train, `"rest"` for all else: labels for `optax.partition`.

    `tx = optax.partition({"block": optax.adamw(1e-5), "rest": optax.adamw(1e-5)}, jpeft.optim.block_labels)`.
    """
    own = {f"{SHARED}/{name}" for name in refs(nodes_of(trainable, Block))}

    def label(path, x):
        mark = "block" if isinstance(x, Block) or name_of(path) in own else "rest"
        return jax.tree.map(lambda _: mark, x)

    return jax.tree_util.tree_map_with_path(label, trainable, is_leaf=is_node)


def _carried(old: optax.OptState, new: optax.OptState, trainable: Params) -> optax.OptState:
    """The `new` state, with what is not of blocks as it was in the `old` one."""
    of = dict(jax.tree_util.tree_leaves_with_path(block_labels(trainable)))
    leaves, structure = jax.tree_util.tree_flatten_with_path(new)
    before = dict(jax.tree_util.tree_leaves_with_path(old))
    # A moment's path ends in that of its parameter; before it is the moment's name, and before that its state's path.
    ends = {path: next((n for n in range(len(path)) if path[n:] in of), None) for path, _ in leaves}
    held: dict[Any, set[str]] = {}
    for path, end in ends.items():
        if end is not None:
            held.setdefault(path[: max(end - 1, 0)], set()).add(of[path[end:]])

    def carry(path, x):
        end = ends[path]
        if end is not None:
            return x if of[path[end:]] == "block" else before[path]
        kinds = held.get(path[:-1], set())
        if len(kinds) == 2 and path[-1] == GetAttrKey("count"):
            raise ValueError(
                f"The moments of blocks start anew, but opt_state{jax.tree_util.keystr(path)} counts the steps of "
                "others too. Give each its own count:\n"
                '  tx = optax.partition({"block": tx, "rest": tx}, jpeft.optim.block_labels)'
            )
        return x if kinds == {"block"} else before[path]

    return structure.unflatten([carry(path, x) for path, x in leaves])
