"""Sparse changes: some entries of a parameter train."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._kernel import fold, folded
from .._node import Frozen, Reparam, Trainable, value, whole
from .._targets import Sites, Targets, named_leaves, parameters
from .._tree import Params, put, transform


class Sparse(Reparam):
    r"""$W'_i = W_i + v_k$ for the entries $i = indices_k$, and $W'_i = W_i$ for all others.

    The entries of the `(in, out)` matrix are counted row by row. An index past the last one is of no entry: it fills up
    the shorter lists of a stack of matrices.
    """

    values: Trainable[jax.Array, "entries"]
    indices: Frozen[jax.Array, "entries"]  # int32, each entry once

    def weight(self, w):
        return w.ravel().at[self.indices].add(self.values.astype(w.dtype), mode="drop").reshape(w.shape)


def entries(shape: tuple[int, ...]) -> int:
    """How many entries a matrix of `shape` has.

    **Raises** `ValueError` for more than an index of 32 bits can tell apart.
    """
    size = math.prod(shape)
    if size > np.iinfo(np.int32).max:
        raise ValueError(f"A matrix of shape {shape} has more entries than an int32 counts: leave it out of `targets`.")
    return size


def random_indices(key: jax.Array, shape: tuple[int, ...], count: int) -> jax.Array:
    """The indices of `count` entries of a matrix, at random and without replacement, in order."""
    return jnp.sort(jax.random.permutation(key, jnp.arange(entries(shape), dtype=jnp.int32))[:count])


def listed(mask: np.ndarray, axes: str) -> np.ndarray:
    """The indices `(stack..., entries)`, as `Sparse` has them, of what is true in a kernel."""
    *stack, d_in, d_out = folded(mask.shape, axes)
    size = entries((d_in, d_out))
    lists = [np.flatnonzero(matrix) for matrix in np.asarray(fold(mask, axes)).reshape(-1, size)]
    found = np.full((len(lists), max(map(len, lists))), size, np.int32)
    for row, one in zip(found, lists, strict=True):
        row[: len(one)] = one
    return found.reshape(*stack, found.shape[1])


@transform
def sparse(
    params: Params,
    *,
    mask: Any,
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    """Let the entries train where `mask` is true, from where they are. See `Sparse`.

    **Arguments:**

    - `mask`: a tree as that of the parameters, with a boolean array where entries of a parameter train and `None`
      elsewhere, such as `mask_of` makes. A parameter of which nothing is true stays as it is.
    - `targets`, `sites`: which of the parameters in `mask`, by default all; and which of their axes are stacked: those
      have a list of entries for each matrix, filled up to the longest.
    - `key`: not used: every change starts at zero.

    **Raises** `ValueError` for a mask that is true nowhere or in no target, that has a path which is no parameter of
    floating point, another shape or other values than booleans, and for matrices of $2^{31}$ entries or more.
    """
    masks = {name: np.asarray(value(x)) for name, x in named_leaves(mask).items()}
    _check(masks, named_leaves(params))
    masks = {name: x for name, x in masks.items() if x.any()}
    if not masks:
        raise ValueError("`mask` is true nowhere: nothing would train.")
    axes = parameters(params, targets or (lambda name, _: name in masks), sites)
    if not masks.keys() & axes.keys():
        raise ValueError(f"`mask` is true in no target, nothing would train. It is true in: {', '.join(masks)}.")

    def one(name, x):
        indices = listed(masks[name], axes[name])
        return Sparse(base=x, axes=axes[name], values=jnp.zeros(indices.shape), indices=jnp.asarray(indices))

    return put(params, {name: functools.partial(one, name) for name in axes if name in masks}, over_nodes=True)


def _check(masks: dict[str, np.ndarray], leaves: dict[str, Any]) -> None:
    faults = []
    for name, mask in masks.items():
        is_of = whole(leaves[name]) if name in leaves else None
        if is_of is None:
            faults.append(f"{name}: there is no such parameter")
        elif mask.shape != is_of.shape or mask.dtype != bool:
            faults.append(f"{name}: the mask is {mask.dtype}{mask.shape}, the parameter needs bool{is_of.shape}")
        elif not jnp.issubdtype(is_of.dtype, jnp.floating):
            faults.append(f"{name}: its dtype is {is_of.dtype}, which does not train")
    if faults:
        raise ValueError(
            "`mask` does not fit the parameters:\n  " + "\n  ".join(faults) + "\n"
            "It is made of the same tree: jpeft.sparse(params, mask=jpeft.magnitude_mask(params, density=0.01))."
        )
