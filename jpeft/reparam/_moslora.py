"""MoSLoRA: mixture of subspaces in low-rank adaptation."""

from typing import Literal

import jax

from .._node import Trainable
from .._targets import Option, Sites, Targets, one_of
from .._tree import Params, transform, wrap
from ._factors import check, factors, scale_of, uniform
from ._low_rank import LowRank


class MoSLoRA(LowRank):
    r"""$W' = W + s\,A M B$: LoRA whose columns of $A$ and rows of $B$ all meet, as the mixer $M$ has it.

    Wu et al., [Mixture-of-Subspaces in Low-Rank Adaptation](https://arxiv.org/abs/2406.11909), EMNLP 2024.
    """

    a: Trainable[jax.Array, "in rank"]
    mixer: Trainable[jax.Array, "rank rank"]
    b: Trainable[jax.Array, "rank out"]

    @property
    def right(self):
        return self.mixer @ self.b


MIXERS = {"uniform": lambda key, shape: uniform(key, shape, shape[0]), "orthogonal": jax.nn.initializers.orthogonal()}


@transform
def moslora(
    params: Params,
    *,
    rank: Option = 8,
    alpha: Option = None,
    rslora: bool = False,
    dropout: Option = 0.0,
    init: Option = "uniform",
    mixer: Literal["uniform", "orthogonal"] = "uniform",
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Add a term of low rank, with a trainable mixer between its factors, to every targeted kernel. See `MoSLoRA`.

    **Arguments:** those of `lora`, but `freeze_a`, and

    - `mixer`: its start, $M \sim U(\pm 1/\sqrt r)$ or orthogonal.

    **Raises** `ValueError` for a mixer that there is not, and as `lora` does.
    """
    one_of("mixer", mixer, MIXERS)

    def new(key, w, *, rank, alpha, dropout, init):
        check(rank, dropout)
        outer, inner = jax.random.split(key)
        a, b = factors(outer, w, rank, init)
        mixed = MIXERS[mixer](inner, (rank, rank))
        return MoSLoRA(a=a, mixer=mixed, b=b, scale=scale_of(alpha, rank, rslora), dropout=dropout)

    how = {"rank": rank, "alpha": alpha, "dropout": dropout, "init": init}
    return wrap(params, new, targets=targets, sites=sites, key=key, **how)
