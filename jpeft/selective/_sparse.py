"""Sparse changes: some entries of a parameter train."""

import jax

from .._node import Frozen, Reparam, Trainable


class Sparse(Reparam):
    r"""$W'_i = W_i + v_k$ for the entries $i = indices_k$, and $W'_i = W_i$ for all others.

    The entries of the `(in, out)` matrix are counted row by row. An index past the last one is of no entry: it fills up
    the shorter lists of a stack of matrices.
    """

    values: Trainable[jax.Array, "entries"]
    indices: Frozen[jax.Array, "entries"]  # int32, each entry once

    def weight(self, w):
        return w.ravel().at[self.indices].add(self.values.astype(w.dtype), mode="drop").reshape(w.shape)
