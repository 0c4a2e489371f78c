"""DeLoRA: decoupled low-rank adaptation."""

import jax
import jax.numpy as jnp

from .._node import Frozen, Trainable, widened
from .._targets import Option, Sites, Targets
from .._tree import Params, transform, wrap
from ._factors import check, factors
from ._low_rank import LowRank


SMALLEST = 1e-4  # a norm below it counts as it


class DeLoRA(LowRank):
    r"""$W' = W + \frac{\lambda}{r}\,\mathrm{diag}(\nu)\,\hat A \hat B$, where $\nu_i$ is the norm of row $i$ of $W$.

    The columns of $\hat A$ and the rows of $\hat B$ are those of $A$ and $B$ over their norms, of which those below
    $10^{-4}$ count as $10^{-4}$. In units of $\nu$ the change has a Frobenius norm of $|\lambda|$ at most.

    Bini et al., [Decoupling Angles and Strength in Low-rank Adaptation](https://arxiv.org/abs/2503.18225), ICLR 2025.
    """

    a: Trainable[jax.Array, "in rank"]
    b: Trainable[jax.Array, "rank out"]
    bound: Trainable[jax.Array, ""]  # lambda
    norms: Frozen[jax.Array, "in"]

    @property
    def left(self):
        return self.norms[..., None] * unit(self.a, axis=-2)

    @property
    def right(self):
        return (self.bound / self.b.shape[-2])[..., None, None] * unit(self.b, axis=-1)


def unit(x: jax.Array, axis: int) -> jax.Array:
    """`x` over its norms along an axis, which are `SMALLEST` at least: its gradient at zero is finite."""
    wide = widened(x)  # in float16 the square of `SMALLEST` is zero
    squares = jnp.sum(wide * wide, axis=axis, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.maximum(squares, SMALLEST**2))).astype(x.dtype)


@transform
def delora(
    params: Params,
    *,
    rank: Option = 8,
    bound: Option = 15.0,
    dropout: Option = 0.0,
    init: Option = "uniform",
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Add a term of low rank whose direction and size train apart to every targeted kernel. See `DeLoRA`.

    **Arguments:**

    - `rank`: how many directions; a number, or a mapping from patterns to numbers, as are `bound`, `dropout` and
      `init`.
    - `bound`: where $\lambda$ starts. It trains.
    - `dropout`: the rate at which inputs of the term are dropped, where `apply` is given a `"dropout"` key.
    - `init`: the start of $A$ and $B$, as in `lora`.
    - `targets`, `sites`: which kernels. By default every one but the output head.
    - `key`: for $A$; `jax.random.key(0)` if left out.

    **Raises** `ValueError` as `lora` does.
    """

    def new(key, w, *, rank, bound, dropout, init):
        check(rank, dropout)
        a, b = factors(key, w, rank, init)
        norms = jnp.linalg.norm(w.astype(jnp.float32), axis=1)
        return DeLoRA(a=a, b=b, bound=jnp.asarray(bound, jnp.float32), norms=norms, dropout=dropout)

    how = {"rank": rank, "bound": bound, "dropout": dropout, "init": init}
    return wrap(params, new, targets=targets, sites=sites, key=key, **how)
