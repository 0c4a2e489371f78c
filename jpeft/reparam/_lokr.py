"""LoKr: low-rank Kronecker product."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from .._node import Branch, Static, Trainable
from .._targets import Option, Sites, Targets
from .._tree import Params, transform, wrap
from ._factors import check, scale_of, uniform
from ._windows import over, uniform_factors, windows


class LoKr(Branch):
    r"""$W' = W + s\,(W_1 \otimes W_2)$, and $x (W_1 \otimes W_2) = \mathrm{vec}(W_1^T\,\mathrm{mat}(x)\,W_2)$.

    A matrix $W_n$ is an array, or factors `(a, b)` whose product it is; $W_2$ may be `(a, b, t)`, of which `t` spreads
    `a` over the window of a convolution, as in `LoHa`. The positions of a window are the slowest axis of $W_2$.

    Yeh et al., [LyCORIS](https://arxiv.org/abs/2309.14859), ICLR 2024; Edalati et al.,
    [KronA](https://arxiv.org/abs/2212.10650), 2022.
    """

    w1: Trainable[Any]  # (in1, out1), or (in1, rank) and (rank, out1)
    w2: Trainable[Any]  # (window in2, out2), or (window in2, rank) and (rank, out2), or with t (window, rank, rank)
    scale: Static[float]
    window: Static[int] = 1

    def weight(self, w):
        w1, w2 = self._matrices()
        return w + self.scale * jnp.einsum("ip,kjq->kijpq", w1, w2).reshape(w.shape)

    def branch(self, x, key):
        w1, w2 = self._matrices()
        z = x.reshape(*x.shape[:-1], self.window, w1.shape[0], w2.shape[1])
        y = jnp.einsum("...kij,ip,kjq->...pq", z, w1, w2)
        return self.scale * y.reshape(*x.shape[:-1], w1.shape[1] * w2.shape[2])

    def _matrices(self):
        """W1 `(in1, out1)` and W2 `(window, in2, out2)`."""
        w2 = _product(self.w2)
        return _product(self.w1), w2.reshape(self.window, -1, w2.shape[-1])


def _product(parts: Any) -> jax.Array:
    """The matrix that is an array, or a product of factors."""
    if not isinstance(parts, tuple):
        return parts
    a, b, *t = parts
    return over(a, *t) @ b


def factorization(size: int, factor: int = -1) -> tuple[int, int]:
    """Two divisors of `size` whose product it is: `factor` and the other one, if `factor` is a divisor.

    Else the two nearest to each other, of which the smaller, which is first, is at most `factor`; -1 for no bound.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    bound = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    small = max((n for n in range(1, bound + 1) if size % n == 0), default=1)
    return small, size // small


@transform
def lokr(
    params: Params,
    *,
    rank: Option = 8,
    alpha: Option = None,
    init: str = "peft",
    decompose_both: bool = False,
    decompose_factor: int = -1,
    effective_conv: bool = False,
    scale_arrays: bool = True,
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Add the Kronecker product of two small matrices to every targeted kernel. See `LoKr`.

    **Arguments:**

    - `rank`: of $W_2$, and the term's scale; a number, or a mapping from patterns to numbers, as is `alpha`. $W_2$ is
      factored if its larger side is more than twice the rank, and is an array otherwise.
    - `alpha`: the product is scaled by $s$ = `alpha / rank`. Left out, $s = 1$.
    - `init`: which matrix starts at zero: $W_1$ for `"peft"`, $W_2$ for `"lycoris"`. The other one is uniform.
    - `decompose_both`: whether $W_1$ is factored by the same rule.
    - `decompose_factor`: the size of $W_1$ on both sides, where it is a divisor; -1 for divisors near the square root.
    - `effective_conv`: factor the kernels of convolutions over their windows, too.
    - `scale_arrays`: whether it is so scaled, too, where neither $W_1$ nor $W_2$ is factored, as in PEFT; or $s = 1$
      there, as in LyCORIS.
    - `targets`, `sites`: which kernels. By default every one but the output head. That a kernel is a convolution's,
      and its window no part of the factorization, `sites` must tell.
    - `key`: for what is uniform; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for a rank below one, an unknown `init`, and for targets as `wrap` does.
    """
    if init not in ("peft", "lycoris"):
        raise ValueError(f"`init` is {init!r}: 'peft' starts from a W1 of zeros, 'lycoris' from a W2 of zeros.")

    def new(key, w, *, rank, alpha, window):
        check(rank)
        (in1, in2), (out1, out2) = (factorization(n, decompose_factor) for n in (w.shape[0] // window, w.shape[1]))
        left, right = jax.random.split(key)
        if decompose_both and rank < max(in1, out1) / 2:
            w1 = uniform_factors(left, in1, rank, out1)
        else:
            w1 = uniform(left, (in1, out1), in1)
        if rank >= max(in2, out2) / 2:
            w2 = uniform(right, (window * in2, out2), window * in2)
        elif effective_conv:
            w2 = uniform_factors(right, in2, rank, out2, window)
        else:
            w2 = uniform_factors(right, window * in2, rank, out2)
        w1, w2 = (_zeroed(w1, 1), w2) if init == "peft" else (w1, _zeroed(w2, 0))
        factored = isinstance(w1, tuple) or isinstance(w2, tuple)
        scale = scale_of(alpha, rank) if scale_arrays or factored else 1.0
        return LoKr(w1=w1, w2=w2, scale=scale, window=window)

    how = {"rank": rank, "alpha": alpha, "window": windows(params, targets, sites)}
    return wrap(params, new, targets=targets, sites=sites, key=key, **how)


def _zeroed(parts: Any, place: int) -> Any:
    """Zeros in place of an array, or of one of its factors."""
    if not isinstance(parts, tuple):
        return jnp.zeros_like(parts)
    return tuple(jnp.zeros_like(x) if n == place else x for n, x in enumerate(parts))
