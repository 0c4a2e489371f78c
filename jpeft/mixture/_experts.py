"""Experts of low rank, and gates that weigh them."""

import abc

import jax
import jax.numpy as jnp

from .._node import Static
from ._term import Term


class Experts(Term):
    r"""$f(x) = s \sum_e g_e(x)\,x A_e B_e$. Subclasses have the arrays `a` and `b`, and say what the gates are.

    All experts are computed, as one product of rank $E r$: gates of zero save nothing.
    """

    scale: Static[float] = 1.0

    grows = ("rank",)
    scaled_by = ("b",)

    @abc.abstractmethod
    def gates(self, x: jax.Array) -> jax.Array:
        """$g(x)$: `(..., in)` -> `(..., expert)`, in float32."""

    def term(self, x, dropped, key):
        inner = jnp.einsum("...i,eir->...er", dropped, self.a) * self.gates(x).astype(x.dtype)[..., None]
        return self.scale * jnp.einsum("...er,ero->...o", inner, self.b)


def largest(x: jax.Array, count: int) -> jax.Array:
    """1 where `x (..., n)` is among the `count` largest, else 0: of equal ones the first."""
    _, index = jax.lax.top_k(x, count)
    return jnp.sum(jax.nn.one_hot(index, x.shape[-1], dtype=x.dtype), axis=-2)
