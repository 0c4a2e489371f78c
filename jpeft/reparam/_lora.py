"""LoRA: low-rank adaptation."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from .._node import Branch, Static, Trainable
from .._operands import dropout as drop
from .._targets import Option, Sites, Targets
from .._tree import Params, transform, wrap


class LoRA(Branch):
    r"""$W' = W + s A B$, and on activations $y = x W + s\,\mathrm{drop}(x) A B$.

    Hu et al., [LoRA: Low-Rank Adaptation of Large Language Models](https://arxiv.org/abs/2106.09685), ICLR 2022.
    """

    a: Trainable[jax.Array, "in rank"]
    b: Trainable[jax.Array, "rank out"]
    scale: Static[float]
    dropout: Static[float] = 0.0

    def weight(self, w):
        return w + self.scale * (self.a @ self.b)

    def branch(self, x, key):
        return self.scale * (drop(x, self.dropout, key) @ self.a) @ self.b


def _uniform(key, shape):  # U(-1/sqrt(in), 1/sqrt(in)), what torch calls kaiming_uniform_(a=sqrt(5))
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) / shape[0] ** 0.5


def _gaussian(key, shape):  # N(0, 1/rank^2)
    return jax.random.normal(key, shape) / shape[1]


def _orthogonal(key, shape):  # orthonormal columns
    return jnp.linalg.qr(jax.random.normal(key, shape))[0]


INITS = {"uniform": _uniform, "gaussian": _gaussian, "orthogonal": _orthogonal}


@transform
def lora(
    params: Params,
    *,
    rank: Option = 8,
    alpha: Option = None,
    rslora: bool = False,
    dropout: Option = 0.0,
    init: Literal["uniform", "gaussian", "orthogonal"] | Callable[..., jax.Array] = "uniform",
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Add a trainable term of low rank to every targeted kernel. See `LoRA`.

    **Arguments:**

    - `rank`: the inner dimension of $A B$; a number, or a mapping from patterns to numbers, as are `alpha`, `dropout`.
    - `alpha`: the term is scaled by $s$ = `alpha / rank`. Left out, $s = 1$.
    - `rslora`: scale by `alpha / sqrt(rank)` instead, after Kalajdzievski, <https://arxiv.org/abs/2312.03732>.
    - `dropout`: the rate at which inputs of the term are dropped, where `apply` is given a `"dropout"` key.
    - `init`: of $A$; $B$ is zero, so that $W' = W$ at the start. `"uniform"` is $U(\pm 1/\sqrt{in})$, `"gaussian"`
      $N(0, 1/r^2)$, `"orthogonal"` has orthonormal columns; or a function `(key, (in, rank)) -> A`.
      An embedding that is looked up and has no output to speak of is served the same way.
    - `targets`, `sites`: which kernels. By default every one but the output head.
    - `key`: for $A$; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for a rank below one, a dropout outside `[0, 1)`, and for targets as `wrap` does.
    """
    make = INITS.get(init) if isinstance(init, str) else init
    if make is None:
        raise ValueError(f"`init` is {init!r}: one of {', '.join(INITS)}, or a function `(key, shape) -> A`.")

    def new(key, w, *, rank, alpha, dropout):
        if rank < 1 or not 0 <= dropout < 1:
            raise ValueError(f"LoRA needs a rank of at least 1 and a dropout in [0, 1), not {rank=} and {dropout=}.")
        d_in, d_out = w.shape
        scale = 1.0 if alpha is None else alpha / (rank**0.5 if rslora else rank)
        return LoRA(a=make(key, (d_in, rank)), b=jnp.zeros((rank, d_out)), scale=scale, dropout=dropout)

    return wrap(params, new, targets=targets, sites=sites, key=key, rank=rank, alpha=alpha, dropout=dropout)
