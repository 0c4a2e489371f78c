"""LoHa: low-rank Hadamard product."""

import jax
import jax.numpy as jnp

from .._node import Branch, Static, Trainable
from .._targets import Option, Sites, Targets
from .._tree import Params, transform, wrap
from ._factors import check, scale_of
from ._windows import over, uniform_factors, windows


class LoHa(Branch):
    r"""$W' = W + s\,(A_1 B_1) \odot (A_2 B_2)$, of rank $r^2$ at most.

    It is a term of rank $r^2$: $(A_1 B_1) \odot (A_2 B_2) = A B$, where column $(i, j)$ of $A$ is the product of column
    $i$ of $A_1$ and column $j$ of $A_2$, and so for the rows of $B$. Activations are multiplied with these.

    For a convolution $A_n$ may be $\sum_j a_{n,c,j}\,t_{n,k,j,i}$ at position $k$ and channel $c$, for column $i$.

    Hyeon-Woo et al., [FedPara](https://arxiv.org/abs/2108.06098), ICLR 2022, with proposition 3 for convolutions.
    """

    a1: Trainable[jax.Array, "in rank"]
    b1: Trainable[jax.Array, "rank out"]
    a2: Trainable[jax.Array, "in rank"]
    b2: Trainable[jax.Array, "rank out"]
    scale: Static[float]
    t1: Trainable[jax.Array | None, "window rank rank"] = None
    t2: Trainable[jax.Array | None, "window rank rank"] = None

    def weight(self, w):
        return w + self.scale * (over(self.a1, self.t1) @ self.b1) * (over(self.a2, self.t2) @ self.b2)

    def branch(self, x, key):
        a1, a2 = over(self.a1, self.t1), over(self.a2, self.t2)
        a = a1[..., :, None] * a2[..., None, :]
        b = self.b1[..., :, None, :] * self.b2[..., None, :, :]
        rank = a.shape[-1] ** 2
        return self.scale * (x @ a.reshape(*a.shape[:-2], rank)) @ b.reshape(*b.shape[:-3], rank, b.shape[-1])


@transform
def loha(
    params: Params,
    *,
    rank: Option = 8,
    alpha: Option = None,
    effective_conv: bool = False,
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Add the product, entry by entry, of two terms of low rank to every targeted kernel. See `LoHa`.

    **Arguments:**

    - `rank`: of each term; a number, or a mapping from patterns to numbers, as is `alpha`.
    - `alpha`: the product is scaled by $s$ = `alpha / rank`. Left out, $s = 1$.
    - `effective_conv`: factor the kernels of convolutions, which `sites` must tell, over their windows, too.
    - `targets`, `sites`: which kernels. By default every one but the output head.
    - `key`: for all but $A_2$, which starts at zero; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for a rank below one, and for targets as `wrap` does.
    """

    def new(key, w, *, rank, alpha, window):
        check(rank)
        channels, (left, right) = w.shape[0] // window, jax.random.split(key)
        a1, b1, *t1 = uniform_factors(left, channels, rank, w.shape[1], window)
        a2, b2, *t2 = uniform_factors(right, channels, rank, w.shape[1], window)
        cores = dict(zip(("t1", "t2"), (*t1, *t2), strict=False))
        return LoHa(a1=a1, b1=b1, a2=jnp.zeros_like(a2), b2=b2, scale=scale_of(alpha, rank), **cores)

    window = windows(params, targets, sites) if effective_conv else 1
    return wrap(params, new, targets=targets, sites=sites, key=key, rank=rank, alpha=alpha, window=window)
