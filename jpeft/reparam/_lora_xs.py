"""LoRA-XS: a small matrix between singular vectors of the kernel."""

import jax
import jax.numpy as jnp

from .._node import Frozen, Trainable
from .._targets import Option, Sites, Targets
from .._tree import Params, transform, wrap
from ._factors import check, scale_of
from ._low_rank import LowRank
from ._singular import check_part, singular


class LoRAXS(LowRank):
    r"""$W' = W + s\,A R B$ with $A = U_r \Sigma_r$ and $B = V_r^T$ of $W = U \Sigma V^T$: only $R$ trains.

    $W$ stays whole: nothing is taken out of it.

    Bałazy et al., [LoRA-XS: Low-Rank Adaptation with Extremely Small Number of
    Parameters](https://arxiv.org/abs/2405.17604), 2024.
    """

    a: Frozen[jax.Array, "in rank"]
    r: Trainable[jax.Array, "rank rank"]
    b: Frozen[jax.Array, "rank out"]

    @property
    def right(self):
        return self.r @ self.b


@transform
def lora_xs(
    params: Params,
    *,
    rank: Option = 16,
    alpha: Option = None,
    deviation: float = 1e-5,
    dropout: Option = 0.0,
    iterations: int | None = None,
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Train a matrix of `rank` times `rank` between the first singular vectors of every targeted kernel. See `LoRAXS`.

    **Arguments:**

    - `rank`: how many singular vectors; a number, or a mapping from patterns to numbers, as are `alpha` and `dropout`.
    - `alpha`: the term is scaled by $s$ = `alpha / rank`. Left out, $s = 1$.
    - `deviation`: of the start $R \sim N(0, deviation^2)$, which is near $W' = W$; with 0 it is exact, and trains too.
    - `dropout`: the rate at which inputs of the term are dropped, where `apply` is given a `"dropout"` key.
    - `iterations`: of a randomized decomposition, such as 4; by default the exact one.
    - `targets`, `sites`: which kernels. By default every one but the output head.
    - `key`: for $R$ and the randomized decomposition; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for a rank below one or above a kernel's, a dropout outside `[0, 1)`, and for targets as
    `wrap` does.
    """

    def new(key, w, *, rank, alpha, dropout):
        check(rank, dropout)
        check_part(w, rank)
        outer, inner = jax.random.split(key)
        u, s, v = singular(outer, w.astype(jnp.float32), rank, iterations)
        r = deviation * jax.random.normal(inner, (rank, rank))
        return LoRAXS(a=u * s[None], r=r, b=v, scale=scale_of(alpha, rank), dropout=dropout)

    return wrap(params, new, targets=targets, sites=sites, key=key, rank=rank, alpha=alpha, dropout=dropout)
