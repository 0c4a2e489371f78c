"""SpIEL's transition: the entries of sparse changes move, and the optimizer forgets those that have."""

from typing import Any

import jax
import jax.numpy as jnp

from .._kernel import fold
from .._node import is_param, whole
from .._targets import name_of, named_leaves
from .._tree import Params, map_nodes, nodes_of, partition
from ..selective._sparse import Sparse
from ._state import map_moments


def reselect(params: Params, opt_state: Any, scores: Params, *, rate: jax.typing.ArrayLike) -> tuple[Params, Any]:
    r"""Move the entries that have changed least to where scores are largest: a step between two steps of training.

    Of the $k$ entries of every `Sparse` matrix, of those that stand over each other the last, the `rate` $k$ with the
    smallest $|v_i|$ are dropped, their change since they were selected, and their parameters are what the base says
    again. As many are selected of those that were not, by their largest $|score_i|$. They start at zero, and so does
    all that the optimizer remembers of them. Everything else stays as it was, bit by bit. No shape changes, and it can
    be compiled.

    **Arguments:**

    - `params`: the whole tree.
    - `opt_state`: of an optimizer for its trainable part; with `scale_by_aged_adam`, ages start anew.
    - `scores`: a tree of arrays of the parameters' shapes, such as sums of gradients. A `Sparse` without one stays.
    - `rate`: the share of entries to replace, from 0 to 1, rounded to whole entries; fewer where fewer are left to
      select.

    **Raises** `ValueError`, with every path, for scores of another shape than their parameter, where no `Sparse` has
    scores, and for an `opt_state` that holds moments of them in a form that is not known.
    """
    scores = named_leaves(scores)
    holders = {name: x for name, x in named_leaves(params).items() if nodes_of(x, Sparse)}
    scores = {name: scores[name] for name in holders if name in scores}
    if not scores:
        raise ValueError(
            f"No `Sparse` node has scores; these are in the tree: {sorted(holders)}. `jpeft.spiel(params)` makes them, "
            "and scores have the parameters' names."
        )
    expected = {name: whole(holders[name]).shape for name in scores}
    wrong = [f"  {n}: {scores[n].shape}, not {shape}" for n, shape in expected.items() if scores[n].shape != shape]
    if wrong:
        raise ValueError("Scores have their parameter's shape:\n" + "\n".join(wrong))

    def one(path, x):
        score = scores.get(name_of(path))
        move = lambda node: _moved(node, score, rate)
        return x if score is None else map_nodes(move, x, Sparse, nested=False)

    new = jax.tree_util.tree_map_with_path(one, params, is_leaf=is_param)
    return new, _forgotten(opt_state, params, new)


def _is_sparse(x: Any) -> bool:
    return isinstance(x, Sparse)


def _moved(node: Sparse, score: jax.Array, rate: jax.typing.ArrayLike) -> Sparse:
    """The node with the places that have changed least moved to the largest scores, in every matrix of a stack."""

    def move(node, score):
        score, count = jnp.abs(score.ravel()), len(node.indices)
        held = node.indices < score.size  # the others only fill up the list
        total = jnp.sum(held)
        wanted = jnp.round(jnp.clip(jnp.asarray(rate, jnp.float32), 0, 1) * total.astype(jnp.float32))
        number = jnp.minimum(wanted.astype(total.dtype), score.size - total)
        order = jnp.argsort(jnp.argsort(jnp.where(held, jnp.abs(node.values), jnp.inf)))  # 0: changed least
        others = score.at[node.indices].set(-1, mode="drop")
        best = jax.lax.top_k(others, min(count, score.size))[1]
        dropped = order < number
        best = best[jnp.minimum(order, len(best) - 1)].astype(node.indices.dtype)
        return jnp.where(dropped, 0, node.values), jnp.where(dropped, best, node.indices)

    values, indices = node.replace(base=None).each(move, fold(score, node.axes))
    return node.replace(values=values, indices=indices)


def _forgotten(opt_state: Any, old: Params, new: Params) -> Any:
    """The optimizer's state with zeros for the entries that have moved."""

    def mark(old, new):
        if not _is_sparse(new):
            return False
        return new.replace(values=old.indices != new.indices, base=jax.tree.map(lambda _: False, new.base))

    moved, _ = partition(jax.tree.map(mark, old, new, is_leaf=_is_sparse))
    trainable, _ = partition(new)
    shapes = {x.values.shape for x in nodes_of(trainable, Sparse, nested=False).values()}
    unknown = [x.shape for x in jax.tree.leaves(map_moments(lambda m: None, opt_state, trainable)) if jnp.ndim(x)]
    if shapes & set(unknown):
        raise ValueError(
            f"The optimizer's state holds arrays of shapes {sorted(shapes & set(unknown))} in no tree that is built as "
            "the trainable one: give the state of an optimizer of all that trains."
        )
    clear = lambda m, moved: jnp.where(moved, jnp.zeros_like(m), m) if jnp.shape(m) == jnp.shape(moved) else m
    return map_moments(clear, opt_state, trainable, moved)
