"""LoRA: low-rank adaptation."""

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


def _uniform(key, d_in, rank, d_out):
    bound = d_in**-0.5  # torch's kaiming_uniform_(a=sqrt(5))
    return jax.random.uniform(key, (d_in, rank), minval=-bound, maxval=bound), jnp.zeros((rank, d_out))


def _gaussian(key, d_in, rank, d_out):
    return jax.random.normal(key, (d_in, rank)) / rank, jnp.zeros((rank, d_out))


def _orthogonal(key, d_in, rank, d_out):
    return jax.nn.initializers.orthogonal()(key, (d_in, rank)), jnp.zeros((rank, d_out))


def _embedding(key, d_in, rank, d_out):
    return jnp.zeros((d_in, rank)), jax.random.normal(key, (rank, d_out))


INITS = {"uniform": _uniform, "gaussian": _gaussian, "orthogonal": _orthogonal, "embedding": _embedding}


@transform
def lora(
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
    - `targets`, `sites`: which kernels. By default every one but the output head.
    - `key`: for $A$; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for a rank below one, a dropout outside `[0, 1)`, an unknown `init`, and for targets as
    `wrap` does.
    """

    def new(key, w, *, rank, alpha, dropout, init):
        if rank < 1 or not 0 <= dropout < 1:
            raise ValueError(f"LoRA needs a rank of at least 1 and a dropout in [0, 1), not {rank=} and {dropout=}.")
        make = INITS.get(init, init)
        if not callable(make):
            known = f"one of {', '.join(INITS)}, or a function (key, in, rank, out) -> (A, B)"
            raise ValueError(f"`init` is {init!r}: {known}.")
        a, b = make(key, w.shape[0], rank, w.shape[1])
        scale = 1.0 if alpha is None else alpha / (rank**0.5 if rslora else rank)
        return LoRA(a=a, b=b, scale=scale, dropout=dropout)

    how = {"rank": rank, "alpha": alpha, "dropout": dropout, "init": init}
    return wrap(params, new, targets=targets, sites=sites, key=key, **how)
