"""How the changes that several adapters make of one matrix become one change."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp


Sign = Literal["total", "frequency"]


def largest(key: jax.Array, d: jax.Array, density: float) -> jax.Array:
    r"""The $\lfloor density \cdot N \rfloor$ entries that are largest in size; the others are zero."""
    count = int(density * d.size * (1 + 1e-12))  # 0.29 of 100 is 29, and not 28.999999999999996
    kept = jax.lax.top_k(jnp.abs(d).ravel(), count)[1]
    return jnp.zeros(d.size, d.dtype).at[kept].set(d.ravel()[kept]).reshape(d.shape)


def some(key: jax.Array, d: jax.Array, density: float) -> jax.Array:
    """Every entry over `density` with that probability, and else zero: on average what it was."""
    return jnp.where(jax.random.bernoulli(key, density, d.shape), d / density, jnp.zeros_like(d))


@dataclasses.dataclass(frozen=True)
class Rule:
    r"""$\sum_i w_i\,p(D_i)$; with a `sign`, of every entry the mean of those $w_i\,p(D_i)$ whose sign is elected.

    **Fields:**

    - `prune`: $p$, called with a key, a change `(in, out)` and the `density`. Without it no entry is lost.
    - `sign`: the elected sign is that of $\sum_i p(D_i)$, the `"total"`, or of $\sum_i \mathrm{sign}(p(D_i))$, the
      `"frequency"`; positive where that is zero. Zeros have no sign, and are not counted.
    """

    prune: Callable[[jax.Array, jax.Array, float], jax.Array] | None = None
    density: float = 1.0
    sign: Sign | None = None

    @property
    def linear(self) -> bool:
        """Whether it is the sum alone."""
        return self.prune is None and self.sign is None

    def __post_init__(self):
        if not 0 < self.density <= 1:
            raise ValueError(f"A density is in (0, 1], not {self.density}.")

    def __call__(self, changes: jax.Array, weights: jax.Array, key: jax.Array) -> jax.Array:
        """One change `(in, out)` of `changes (trees, in, out)`, whose `weights` are `(trees,)`."""
        if self.prune is not None:
            keys = jax.random.split(key, len(changes))
            changes = jax.vmap(lambda k, d: self.prune(k, d, self.density))(keys, changes)
        weighted = weights.astype(changes.dtype)[:, None, None] * changes
        if self.sign is None:
            return weighted.sum(axis=0)
        votes = (changes if self.sign == "total" else jnp.sign(changes)).sum(axis=0, keepdims=True)
        elected = jnp.where(votes >= 0, changes > 0, changes < 0)
        count = jnp.maximum(elected.sum(axis=0, dtype=weighted.dtype), 1)
        return jnp.where(elected, weighted, 0).sum(axis=0) / count
