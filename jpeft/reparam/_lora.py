"""LoRA: low-rank adaptation."""

import jax

from .._node import Frozen, Trainable
from .._targets import Option, Sites, Targets
from .._tree import Params, transform, wrap
from ._factors import check, factors, scale_of
from ._low_rank import LowRank


class LoRA(LowRank):
    r"""$W' = W + s A B$, and on activations $y = x W + s\,\mathrm{drop}(x) A B$.

    Hu et al., [LoRA: Low-Rank Adaptation of Large Language Models](https://arxiv.org/abs/2106.09685), ICLR 2022.
    """

    a: Trainable[jax.Array, "in rank"]
    b: Trainable[jax.Array, "rank out"]

    grows = ("rank",)
    scaled_by = ("b",)


class LoRAFA(LoRA):
    r"""LoRA whose $A$, once drawn, stays: only $B$ trains, and of an input no more than $x A$ is kept for its gradient.

    Zhang et al., [LoRA-FA: Memory-efficient Low-rank Adaptation](https://arxiv.org/abs/2308.03303), 2023.
    """

    a: Frozen[jax.Array, "in rank"]


@transform
def lora(
    params: Params,
    *,
    rank: Option = 8,
    alpha: Option = None,
    rslora: bool = False,
    dropout: Option = 0.0,
    init: Option = "uniform",
    freeze_a: bool = False,
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Add a trainable term of low rank to every targeted kernel. See `LoRA`.

    **Arguments:**

    - `rank`: the inner dimension of $A B$; a number, or a mapping from patterns to numbers, as are `alpha`,
      `dropout` and `init`.
    - `alpha`: the term is scaled by $s$ = `alpha / rank`. Left out, $s = 1$.
    - `rslora`: scale by `alpha / sqrt(rank)` instead, after Kalajdzievski, <https://arxiv.org/abs/2312.03732>.
    - `dropout`: the rate at which inputs of the term are dropped, where `apply` is given a `"dropout"` key.
    - `init`: the start, at which $W' = W$. `"uniform"` is $A \sim U(\pm 1/\sqrt{in})$ and $B = 0$; `"gaussian"`
      $A \sim N(0, 1/r^2)$; `"orthogonal"` an $A$ of orthonormal columns, or rows; `"embedding"`, for tables that are
      looked up, $A = 0$ and $B \sim N(0, 1)$. Or a function `(key, in, rank, out) -> (A, B)`.
    - `freeze_a`: train $B$ alone. See `LoRAFA`.
    - `targets`, `sites`: which kernels. By default every one but the output head.
    - `key`: for $A$; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for a rank below one, an `alpha` that is not above zero, a dropout outside `[0, 1)`, an
    unknown `init`, one whose $A = 0$ is to be frozen, and for targets as `wrap` does.
    """
    node = LoRAFA if freeze_a else LoRA

    def new(key, w, *, rank, alpha, dropout, init):
        check(rank, dropout)
        if freeze_a and init == "embedding":
            raise ValueError("`init='embedding'` starts at A = 0: with `freeze_a=True` the term would stay zero.")
        a, b = factors(key, w, rank, init)
        return node(a=a, b=b, scale=scale_of(alpha, rank, rslora), dropout=dropout)

    how = {"rank": rank, "alpha": alpha, "dropout": dropout, "init": init}
    return wrap(params, new, targets=targets, sites=sites, key=key, **how)
