"""HiRA: Hadamard high-rank adaptation."""

import jax

from .._node import Reparam, Trainable
from .._targets import Option, Sites, Targets
from .._tree import Params, transform, wrap
from ._factors import check, factors


class HiRA(Reparam):
    r"""$W' = W \odot (1 + A B)$. The change $W \odot A B$ has the rank of $W$ times $r$ at most, so no low rank.

    Huang et al., [HiRA: Parameter-Efficient Hadamard High-Rank Adaptation](https://openreview.net/forum?id=TwJrTz9cRS),
    ICLR 2025.
    """

    a: Trainable[jax.Array, "in rank"]
    b: Trainable[jax.Array, "rank out"]

    def weight(self, w):
        return w * (1 + self.a @ self.b)


@transform
def hira(
    params: Params,
    *,
    rank: Option = 32,
    init: Option = "uniform",
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    """Multiply every weight of every targeted kernel by one plus an entry of a matrix of low rank. See `HiRA`.

    **Arguments:**

    - `rank`: the inner dimension of $A B$; a number, or a mapping from patterns to numbers, as is `init`.
    - `init`: the start of $A$ and $B$, as in `lora`.
    - `targets`, `sites`: which kernels. By default every one but the output head.
    - `key`: for $A$; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for a rank below one, an unknown `init`, and for targets as `wrap` does.
    """

    def new(key, w, *, rank, init):
        check(rank)
        a, b = factors(key, w, rank, init)
        return HiRA(a=a, b=b)

    return wrap(params, new, targets=targets, sites=sites, key=key, rank=rank, init=init)
