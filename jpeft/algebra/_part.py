"""A change as a node: of every entry, or of the part of low rank that is nearest to it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .._node import Reparam
from ..reparam._lora import LoRA
from ..selective._delta import Delta


class Part(NamedTuple):
    """A node for one matrix; the squared Frobenius norms of what it leaves out, and of all: none where it is all."""

    node: Reparam
    lost: jax.Array | None = None
    total: jax.Array | None = None


def part(d: jax.Array, rank: int | None) -> Part:
    """The part of rank `rank`, at most, of a change `(in, out)`; all of it without a `rank`, and of a vector."""
    if rank is None or min(d.shape) == 1:
        return Part(Delta(values=d))
    a, b, *squares = _nearest(d, rank)
    return Part(LoRA(a=a, b=b), *squares)


def part_of_product(left: jax.Array, right: jax.Array, rank: int | None) -> Part:
    """The same of a change in factors `(in, n)` and `(n, out)`, which is not formed."""
    if rank is None:
        return Part(LoRA(a=left, b=right))
    (q, x), (p, y) = jnp.linalg.qr(left), jnp.linalg.qr(right.T)
    a, b, *squares = _nearest(x @ y.T, rank)
    return Part(LoRA(a=q @ a, b=b @ p.T), *squares)


def _nearest(d: jax.Array, rank: int) -> tuple[jax.Array, ...]:
    r"""$A = U_r \sqrt{\Sigma_r}$, $B = \sqrt{\Sigma_r} V_r^T$, $\sum_{i > r} \sigma_i^2$ and $\sum_i \sigma_i^2$."""
    u, s, v = jnp.linalg.svd(d, full_matrices=False)
    root = jnp.sqrt(s[:rank])
    return u[:, :rank] * root[None], root[:, None] * v[:rank], jnp.sum(s[rank:] ** 2), jnp.sum(s**2)
