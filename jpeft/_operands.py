"""What stands for `x` in `branch(x)` where no array is multiplied with the kernel: it multiplies without being formed.

`x @ a` is all that an operand can do; whatever else a branch tries raises `NoRule`, and the node's value is taken.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


class NoRule(TypeError):
    """A branch asked an operand for more than a product."""


class Operand(abc.ABC):
    """Stands for an array `(..., in)`."""

    dtype: Any

    @abc.abstractmethod
    def __matmul__(self, a: jax.Array) -> Any:
        """`x @ a`."""

    def map(self, fn: Callable[[jax.Array], jax.Array]) -> "Operand":
        """The operand with `fn` applied to the activations that it is made of."""
        return self

    def __jax_array__(self):
        raise NoRule(f"{type(self).__name__} can only be multiplied from the right with a matrix.")

    def __getattr__(self, name):
        raise NoRule(f"{type(self).__name__} has no {name!r}: it can only be multiplied from the right with a matrix.")


@dataclasses.dataclass(frozen=True)
class Lookup(Operand):
    """The one-hot rows of indices, `(..., in)`: a product with it is a lookup. There is nothing to drop out."""

    rows: Callable[[jax.Array], jax.Array]
    dtype: Any

    def __matmul__(self, a):
        return self.rows(a)


@dataclasses.dataclass(frozen=True)
class Window(Operand):
    """The patches `(..., in)` of an image that a convolution sees: a product with it is a convolution."""

    x: jax.Array
    convolve: Callable[[jax.Array, jax.Array], jax.Array]

    @property
    def dtype(self):
        return self.x.dtype

    def __matmul__(self, a):
        return self.convolve(self.x, a)

    def map(self, fn):
        return dataclasses.replace(self, x=fn(self.x))


@dataclasses.dataclass(frozen=True)
class Routed(Operand):
    """Tokens `(tokens, in)` in the order of their experts: a product with stacked matrices takes each token's own."""

    x: jax.Array
    groups: jax.Array

    @property
    def dtype(self):
        return self.x.dtype

    def __matmul__(self, a):
        return dataclasses.replace(self, x=jax.lax.ragged_dot(self.x, a, self.groups))

    def __mul__(self, scalar):
        if jnp.ndim(scalar):
            raise NoRule("Routed tokens can be multiplied with scalars and matrices only.")
        return dataclasses.replace(self, x=self.x * scalar)

    __rmul__ = __mul__

    def __add__(self, other):
        return dataclasses.replace(self, x=self.x + other.x)

    def __sub__(self, other):
        return dataclasses.replace(self, x=self.x - other.x)

    def map(self, fn):
        return dataclasses.replace(self, x=fn(self.x))


def fold_in(key: jax.Array | None, data: Any) -> jax.Array | None:
    """A key of its own for a part of a computation, where there is a key."""
    return None if key is None else jax.random.fold_in(key, data)


def dropout(x: Any, rate: float, key: jax.Array | None) -> Any:
    """Inverted dropout of an array or an operand: off where there is no `key`."""
    if key is None or not rate:
        return x

    def drop(x):
        keep = jax.random.bernoulli(key, 1 - rate, x.shape)
        return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))

    return x.map(drop) if isinstance(x, Operand) else drop(x)
