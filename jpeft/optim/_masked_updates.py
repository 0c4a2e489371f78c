"""Masks of updates: entries that stay where they are, whatever the optimizer does."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._node import Leaf, is_param
from .._targets import name_of
from .._tree import combine, partition
from ._inner import lenient


class MaskedUpdatesState(NamedTuple):
    """The state of `masked_updates`."""

    inner: Any
    mask: Sequence[jax.Array]  # for every array of the updates; no tree as theirs, for it is no moment


def masked_updates(
    inner: optax.GradientTransformation, mask: Any, *, gradients: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Let only the entries move where `mask` is true: the update is $m \odot u(g)$, where `inner` has $u(g)$.

    Weight decay and momentum are masked too, as they are in the update. A mask of the gradients alone leaves both at
    work, and $u(m \odot g)$ moves every entry.

    **Arguments:**

    - `inner`: an optimizer of the trainable tree.
    - `mask`: a tree as that of the parameters, such as `jpeft.mask_of` makes: a boolean array of the parameter's shape,
      or one boolean for all of it. Where there is `None`, or nothing, the parameter does not move. A path may go on
      into a node, to an array of a method: `mlp/up/kernel/a`. The mask is fitted when the state is made, and is in it.
    - `gradients`: mask the gradients too, so that what `inner` remembers is zero where nothing moves.

    **Raises** `ValueError`, when the state is made, for a mask that is true nowhere and, with every path, where it is
    true but is no boolean of the parameter's shape, or where no array trains whose entries are the parameter's.
    """
    inner = lenient(inner)

    def init(trainable):
        return MaskedUpdatesState(inner.init(trainable), _fitted(mask, trainable))

    def update(updates, state, params=None, **extra):
        def keep(tree):
            leaves, structure = jax.tree.flatten(tree)
            kept = [jnp.where(m, x, jnp.zeros_like(x)) for m, x in zip(state.mask, leaves, strict=True)]
            return structure.unflatten(kept)

        updates, new = inner.update(keep(updates) if gradients else updates, state.inner, params, **extra)
        return keep(updates), MaskedUpdatesState(new, state.mask)

    return optax.GradientTransformationExtraArgs(init, update)


def _fitted(mask: Any, trainable: Any) -> list[jax.Array]:
    """A mask for every array of the trainable tree."""
    masks = {name_of(path): np.asarray(m) for path, m in jax.tree_util.tree_leaves_with_path(mask)}
    masks = {name: m for name, m in masks.items() if m.any()}
    if not masks:
        raise ValueError("`mask` is true nowhere: nothing would move.")
    faults = dict.fromkeys(masks, "nothing trains there")

    def fit(path, x):
        m = masks.get(name := name_of(path))
        if m is not None:
            faults.pop(name)
            found, shapes = _of_entries(m, x), [a.shape for a in jax.tree.leaves(x)]
            if m.dtype != bool or (m.shape and [f.shape for f in found] != shapes):
                faults[name] = f"a mask of {m.dtype}{m.shape} is no mask of {type(x).__name__} with {shapes}"
            return found
        if is_param(x):
            return [m for inside, a in jax.tree_util.tree_leaves_with_path(x) for m in fit((*path, *inside), a)]
        return [np.zeros((), bool)]

    leaves = jax.tree_util.tree_leaves_with_path(trainable, is_leaf=is_param)
    found = [m for path, x in leaves for m in fit(path, x)]
    if faults:
        lines = "".join(f"\n  {name}: {why}" for name, why in faults.items())
        raise ValueError(
            f"`mask` does not fit the trainable tree:{lines}\n"
            "A mask of a parameter's entries needs one that trains entry by entry: jpeft.unfreeze(params, targets=...)."
        )
    return [jnp.asarray(m) for m in found]


def _of_entries(mask: np.ndarray, x: Any) -> list[np.ndarray]:
    """The mask of every array that trains in `x`, where `mask` is one of the parameter; none where there is no such."""
    if not mask.shape:
        return [mask] * len(jax.tree.leaves(x))
    return _pulled_back(mask, x) if isinstance(x, Leaf) else [mask]


def _pulled_back(mask: np.ndarray, node: Leaf) -> list[np.ndarray]:
    """The mask of a node's arrays: it goes the way of a gradient, through a value whose entries are those of arrays."""
    with jax.ensure_compile_time_eval():
        try:
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), node.rebuild(np.zeros(mask.shape)))
            trainable, frozen = partition(zeros)
            _, back = jax.vjp(lambda t: combine(t, frozen).value(), trainable)
            pulled = lambda m: [np.asarray(x) for x in jax.tree.leaves(back(m.astype(np.float32)))]
            ones, found = pulled(np.ones_like(mask)), pulled(mask)
        except (AttributeError, TypeError, ValueError):  # it has no value without its frozen arrays, or another shape
            return []
    return [x != 0 for x in found] if all((x == 1).all() for x in ones) else []
