"""DoRA: weight-decomposed low-rank adaptation."""

import jax
import jax.numpy as jnp

from .._node import Amplified, Static, Trainable
from .._operands import dropout as drop
from .._targets import Option, Sites, Targets
from .._tree import Params, transform, wrap
from ._factors import check, factors, scale_of


class DoRA(Amplified):
    r"""$W' = V\,\mathrm{diag}(m / c)$ with $V = W + s A B$ and $c_j = \lVert V_{:,j} \rVert_2$.

    The norm is that of the weights into one output, and a constant to gradients, as in section 4.3 of the paper.

    Liu et al., [DoRA: Weight-Decomposed Low-Rank Adaptation](https://arxiv.org/abs/2402.09353), ICML 2024.
    """

    a: Trainable[jax.Array, "in rank"]
    b: Trainable[jax.Array, "rank out"]
    magnitude: Trainable[jax.Array, "out"]
    scale: Static[float]
    dropout: Static[float] = 0.0

    def weight(self, w):
        return (w + self.scale * (self.a @ self.b)) * self.gain(w)[None]

    def branch(self, x, key):
        return self.scale * (drop(x, self.dropout, key) @ self.a) @ self.b

    def gain(self, w):
        w, a, b = jax.lax.stop_gradient((w, self.a, self.b))
        # the norm of every column of w + s a b, of which no array of that size is formed
        cross = 2 * (a.T @ w) + self.scale * (a.T @ a @ b)
        c = jnp.sqrt(jnp.maximum(squares(w) + self.scale * jnp.sum(cross * b, axis=0), 0))
        return self.magnitude / jnp.where(c > 0, c, 1)


def squares(w: jax.Array) -> jax.Array:
    """The sum of the squares of every column."""
    return jnp.sum(w * w, axis=0)


@transform
def dora(
    params: Params,
    *,
    rank: Option = 8,
    alpha: Option = None,
    rslora: bool = False,
    dropout: Option = 0.0,
    init: Option = "uniform",
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    """Train the direction of every targeted kernel by a term of low rank, and its magnitude by itself. See `DoRA`.

    **Arguments:** those of `lora`.

    **Raises** `ValueError` as `lora` does.
    """

    def new(key, w, *, rank, alpha, dropout, init):
        check(rank, dropout)
        a, b = factors(key, w, rank, init)
        magnitude = jnp.sqrt(squares(w.astype(jnp.float32)))
        return DoRA(a=a, b=b, magnitude=magnitude, scale=scale_of(alpha, rank, rslora), dropout=dropout)

    how = {"rank": rank, "alpha": alpha, "dropout": dropout, "init": init}
    return wrap(params, new, targets=targets, sites=sites, key=key, **how)
