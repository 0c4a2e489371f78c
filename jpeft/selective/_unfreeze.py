"""Selective methods: some of the parameters themselves train."""

import re

import jax
import jax.numpy as jnp

from .._node import Frozen, Leaf, Static, Trainable
from .._targets import Sites, Targets, name_of, named_leaves, no_match, select
from .._tree import Params, nesting, transform


class Free(Leaf):
    """A parameter that trains: $W' = W$, with $W$ a trainable leaf."""

    array: Trainable[jax.Array]

    def value(self):
        return self.array


class Rows(Leaf):
    """A stacked parameter whose last layers train: $W' = [W_{:L-k}; R]$, joined along the stacked `axis`."""

    base: Frozen[jax.Array]  # the layers that do not train
    rows: Trainable[jax.Array]  # the k that do
    axis: Static[int] = 0

    def value(self):
        return jnp.concatenate([self.base, self.rows], axis=self.axis)
