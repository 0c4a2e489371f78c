"""The largest singular values and vectors of a kernel: where methods start, or what they train between."""

import jax
import jax.numpy as jnp


def singular(key: jax.Array | None, w: jax.Array, rank: int, iterations: int | None) -> tuple[jax.Array, ...]:
    r"""$U_r$, $\Sigma_r$ as a vector, and $V_r^T$ of $W = U \Sigma V^T$; by subspace `iterations`, or exactly.

    Halko et al., [Finding structure with randomness](https://arxiv.org/abs/0909.4061), algorithm 4.4, 10 oversampled.
    """
    if iterations is None:
        u, s, v = jnp.linalg.svd(w, full_matrices=False)
    else:
        orthonormal = lambda m: jnp.linalg.qr(m)[0]
        q = orthonormal(w @ jax.random.normal(key, (w.shape[1], min(rank + 10, *w.shape))))
        for _ in range(iterations):
            q = orthonormal(w @ orthonormal(w.T @ q))
        u, s, v = jnp.linalg.svd(q.T @ w, full_matrices=False)
        u = q @ u
    return u[:, :rank], s[:rank], v[:rank]


def principal(key: jax.Array | None, w: jax.Array, rank: int, iterations: int | None) -> tuple[jax.Array, jax.Array]:
    r"""$U_r \sqrt{\Sigma_r}$ and $\sqrt{\Sigma_r} V_r^T$: `singular`, with the values in both factors alike."""
    u, s, v = singular(key, w, rank, iterations)
    root = jnp.sqrt(s)
    return u * root[None], root[:, None] * v


def check_part(w: jax.Array, rank: int) -> None:
    """**Raises** `ValueError` for a rank that is above the matrix's."""
    if rank > min(w.shape):
        raise ValueError(f"A kernel of {w.shape[0]} inputs and {w.shape[1]} outputs has no part of rank {rank}.")
