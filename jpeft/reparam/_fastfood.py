"""Random projections whose matrices are never kept: they are drawn again from a key wherever they are used."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def hadamard(x: jax.Array) -> jax.Array:
    r"""$H x$ with the Walsh-Hadamard matrix of entries $\pm 1$, $H H = n I$, for a size $n$ that is a power of two.

    $H$ is a Kronecker product of matrices of 2 by 2. Some are multiplied with at once: they take one pass over `x`.
    """
    left = x.size.bit_length() - 1
    while left:
        some = min(left, 5)
        left -= some
        h = functools.reduce(np.kron, [np.array([[1, 1], [1, -1]], x.dtype)] * some)
        x = jnp.einsum("ij,ajb->aib", h, x.reshape(2**left, 2**some, -1), precision="highest")
    return x.reshape(-1)


def fastfood(key: jax.Array, v: jax.Array, size: int) -> jax.Array:
    r"""$H G \Pi H B$ of `v`, filled up with zeros to a power of two, and cut off at `size`: in $n \log n$ operations.

    $B$ is of signs, $\Pi$ a permutation and $G$ normal. It keeps the square of the norm, on average over the key.

    Le et al., [Fastfood](https://arxiv.org/abs/1408.3060), ICML 2013.
    """
    n = 1 << (max(v.size, size) - 1).bit_length()
    signs, order, gains = jax.random.split(key, 3)
    g = jax.random.normal(gains, (n,), v.dtype)
    x = jnp.pad(v, (0, n - v.size)) * jax.random.rademacher(signs, (n,), v.dtype)
    y = hadamard(g * hadamard(x)[jax.random.permutation(order, n)])
    return y[:size] / jnp.sqrt(size * jnp.sum(g**2))


def dense(key: jax.Array, v: jax.Array, size: int) -> jax.Array:
    """A normal matrix `(size, len(v))` times `v`. It keeps the square of the norm, on average over the key."""
    return jax.random.normal(key, (size, v.size), v.dtype) @ v / size**0.5


PROJECTIONS: dict[str, Callable[[jax.Array, jax.Array, int], jax.Array]] = {"fastfood": fastfood, "dense": dense}
