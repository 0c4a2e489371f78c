"""AdaMix of LoRAs: factors whose experts are chosen at random in training, and are one of their mean afterwards."""

import jax
import jax.numpy as jnp

from .._node import Trainable
from .._operands import fold_in
from .._targets import Option, Sites, Targets
from .._tree import Params, transform, wrap
from ..additive._adamix import check_experts, expert
from ._factors import check, factors, scale_of
from ._lora import LoRA
from ._low_rank import LowRank


class AdaMixLoRA(LowRank):
    r"""$W' = W + s A_i B_j$, in a call with a key with experts $i$ and $j$ at random; without, $W + s \bar A \bar B$.

    Every kernel in every call has an $i$ and a $j$ of its own. $\bar A$ and $\bar B$ are the experts' means, each by
    itself: their product is not the mean of products.

    Wang et al., [AdaMix: Mixture-of-Adaptations for Parameter-efficient Model Tuning](https://arxiv.org/abs/2205.12410),
    EMNLP 2022.
    """

    a: Trainable[jax.Array, "experts_a in rank"]
    b: Trainable[jax.Array, "experts_b rank out"]

    @property
    def left(self):
        return expert(self.a, -3, None)

    @property
    def right(self):
        return expert(self.b, -3, None)

    def drawn(self, key):
        return super().drawn(fold_in(key, 2)).routed(key)

    def routed(self, key: jax.Array | None) -> LoRA:
        """The LoRA that a call with the key goes through."""
        a, b = expert(self.a, -3, fold_in(key, 0)), expert(self.b, -3, fold_in(key, 1))
        return LoRA(a=a, b=b, scale=self.scale, dropout=self.dropout, base=self.base, axes=self.axes)

    def at_rest(self, task=None):
        return self.routed(None)


@transform
def adamix_lora(
    params: Params,
    *,
    experts: Option = 4,
    rank: Option = 8,
    alpha: Option = None,
    sharing_a: bool = False,
    sharing_b: bool = True,
    dropout: Option = 0.0,
    init: Option = "uniform",
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Add a trainable term of low rank with several experts to every targeted kernel. See `AdaMixLoRA`.

    Train it as `jpeft.adamix`. After training `jpeft.collapse` leaves a `LoRA`.

    **Arguments:**

    - `experts`: how many; a number, or a mapping from patterns to numbers, as are the options of `jpeft.lora` below.
    - `sharing_a`, `sharing_b`: whether that factor is one for all experts.
    - `rank`, `alpha`, `dropout`, `init`: as for `jpeft.lora`. All experts start as one.
    - `targets`, `sites`: which kernels. By default every one but the output head.
    - `key`: for $A$; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for a number of experts below one, where both factors are shared, and as `jpeft.lora` does.
    """

    def new(key, w, *, experts, rank, alpha, dropout, init):
        check(rank, dropout)
        copies = check_experts(experts, (sharing_a, sharing_b))
        a, b = (jnp.stack([x] * n) for x, n in zip(factors(key, w, rank, init), copies, strict=True))
        return AdaMixLoRA(a=a, b=b, scale=scale_of(alpha, rank), dropout=dropout)

    how = {"experts": experts, "rank": rank, "alpha": alpha, "dropout": dropout, "init": init}
    return wrap(params, new, targets=targets, sites=sites, key=key, **how)
