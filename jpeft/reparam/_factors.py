"""What methods of low rank share: how factors A (in, rank) and B (rank, out) start, and how A B is scaled."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def uniform(key: jax.Array, shape: tuple[int, ...], fan: int) -> jax.Array:
    r"""$U(\pm 1/\sqrt{fan})$: torch's `kaiming_uniform_(a=sqrt(5))`, the start of its linear layers."""
    return jax.random.uniform(key, shape, minval=-(fan**-0.5), maxval=fan**-0.5)


def _uniform(key, d_in, rank, d_out):
    return uniform(key, (d_in, rank), d_in), jnp.zeros((rank, d_out))


def _gaussian(key, d_in, rank, d_out):
    return jax.random.normal(key, (d_in, rank)) / rank, jnp.zeros((rank, d_out))


def _orthogonal(key, d_in, rank, d_out):
    return jax.nn.initializers.orthogonal()(key, (d_in, rank)), jnp.zeros((rank, d_out))


def _embedding(key, d_in, rank, d_out):
    return jnp.zeros((d_in, rank)), jax.random.normal(key, (rank, d_out))


INITS: dict[str, Callable] = {
    "uniform": _uniform,
    "gaussian": _gaussian,
    "orthogonal": _orthogonal,
    "embedding": _embedding,
}


def factors(key: jax.Array, w: jax.Array, rank: int, init: str | Callable) -> tuple[jax.Array, jax.Array]:
    """A and B for the matrix `w`, by a name in `INITS` or a function `(key, in, rank, out) -> (A, B)`.

    **Raises** `ValueError` for an unknown name.
    """
    make = INITS.get(init, init) if isinstance(init, str) else init
    if not callable(make):
        known = f"one of {', '.join(INITS)}, or a function (key, in, rank, out) -> (A, B)"
        raise ValueError(f"`init` is {init!r}: {known}.")
    return make(key, w.shape[0], rank, w.shape[1])


def check(rank: int, dropout: float = 0.0) -> None:
    """**Raises** `ValueError` for a rank below one or a dropout outside `[0, 1)`."""
    if rank < 1 or not 0 <= dropout < 1:
        raise ValueError(f"There must be a rank of at least 1 and a dropout in [0, 1), not {rank=} and {dropout=}.")


def scale_of(alpha: float | None, rank: int, rslora: bool = False) -> float:
    """`alpha / rank`, or `alpha / sqrt(rank)` with `rslora`; 1 where there is no `alpha`.

    **Raises** `ValueError` for an `alpha` of zero, with which nothing would train, or below.
    """
    if alpha is not None and not alpha > 0:
        raise ValueError(f"`alpha` is {alpha}: it must be above 0. Left out, terms are not scaled.")
    return 1.0 if alpha is None else alpha / (rank**0.5 if rslora else rank)
