"""GraLoRA: granular low-rank adaptation."""

import jax
import jax.numpy as jnp

from .._node import Branch, Static, Trainable
from .._operands import dropout as drop
from .._targets import Option, Sites, Targets
from .._tree import Params, transform, wrap
from ._factors import check, scale_of, uniform
from ._sizes import check_divides


class GraLoRA(Branch):
    r"""$W' = W + s\,(D + A_0 B_0)$, where $D$ is of $k \times k$ blocks $A_i^{(j)} B_j^{(i)}$ of rank $r/k$.

    $A_i^{(j)}$ are the $j$-th $r/k$ columns of $A_i$, and $B_j^{(i)}$ the $i$-th $r/k$ rows of $B_j$. $D$ has as many
    parameters and takes as many operations as LoRA of rank $r$, and is of rank $k r$ at most. $A_0 B_0$ is an ordinary
    term of low rank beside it, if there is one.

    Jung et al., [GraLoRA: Granular Low-Rank Adaptation](https://arxiv.org/abs/2505.20355), NeurIPS 2025.
    """

    a: Trainable[jax.Array, "blocks piece_in rank"]
    b: Trainable[jax.Array, "blocks rank piece_out"]
    scale: Static[float] = 1.0
    dropout: Static[float] = 0.0
    whole_a: Trainable[jax.Array | None, "in hybrid"] = None
    whole_b: Trainable[jax.Array | None, "hybrid out"] = None

    def weight(self, w):
        a, b = self.by_block()
        blocks = jnp.einsum("ipjs,jisq->ipjq", a, b).reshape(w.shape)
        return w + self.scale * (blocks if self.whole_a is None else blocks + self.whole_a @ self.whole_b)

    def branch(self, x, key):
        x = drop(x, self.dropout, key)
        pieces = x.reshape(*x.shape[:-1], len(self.a), -1)
        a, b = self.by_block()
        inner = jnp.einsum("...ip,ipjs->...jis", pieces, a)
        y = jnp.einsum("...jis,jisq->...jq", inner, b).reshape(*x.shape[:-1], -1)
        return self.scale * (y if self.whole_a is None else y + x @ self.whole_a @ self.whole_b)

    def by_block(self) -> tuple[jax.Array, jax.Array]:
        """$A$ as `(i, piece_in, j, r / k)` and $B$ as `(j, i, r / k, piece_out)`."""
        k = len(self.a)
        return self.a.reshape(*self.a.shape[:2], k, -1), self.b.reshape(k, k, -1, self.b.shape[-1])


@transform
def gralora(
    params: Params,
    *,
    rank: Option = 32,
    alpha: Option = None,
    blocks: Option = 2,
    hybrid: Option = 0,
    dropout: Option = 0.0,
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Add a term of low rank to each of `blocks` times `blocks` parts of every targeted kernel. See `GraLoRA`.

    **Arguments:**

    - `rank`: the sum of the ranks of the blocks in a row, which divide it evenly; a number, or a mapping from patterns
      to numbers, as are all options up to `dropout`.
    - `alpha`: terms are scaled by $s$ = `alpha / (rank + hybrid)`. Left out, $s = 1$.
    - `blocks`: into how many parts the inputs, and the outputs, are cut. It divides them and `rank`.
    - `hybrid`: the rank of a term for the whole kernel; 0 for none.
    - `dropout`: the rate at which inputs of the terms are dropped, where `apply` is given a `"dropout"` key.
    - `targets`, `sites`: which kernels. By default every one but the output head.
    - `key`: for $A \sim U(\pm \sqrt{k/in})$ and $A_0 \sim U(\pm 1/\sqrt{in})$; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for a rank below one, `blocks` that do not divide the rank or a kernel, with every path,
    a negative `hybrid`, a dropout outside `[0, 1)`, and for targets as `wrap` does.
    """
    check_divides(params, targets, sites, blocks=blocks)

    def new(key, w, *, rank, alpha, blocks, hybrid, dropout):
        check(rank, dropout)
        if rank % blocks or hybrid < 0:
            raise ValueError(
                f"`blocks` must divide the rank, and `hybrid` be at least 0: {rank=}, {blocks=}, {hybrid=}."
            )
        (d_in, d_out), (left, right) = w.shape, jax.random.split(key)
        whole = {"whole_a": uniform(right, (d_in, hybrid), d_in), "whole_b": jnp.zeros((hybrid, d_out))}
        return GraLoRA(
            a=uniform(left, (blocks, d_in // blocks, rank), d_in // blocks),
            b=jnp.zeros((blocks, rank, d_out // blocks)),
            scale=scale_of(alpha, rank + hybrid),
            dropout=dropout,
            **(whole if hybrid else {}),
        )

    how = {"rank": rank, "alpha": alpha, "blocks": blocks, "hybrid": hybrid, "dropout": dropout}
    return wrap(params, new, targets=targets, sites=sites, key=key, **how)
