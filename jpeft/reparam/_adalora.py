"""AdaLoRA: low-rank adaptation in the form of a singular value decomposition, of which values can be masked."""

import jax
import jax.numpy as jnp

from .._node import Frozen, Trainable
from .._targets import Option, Sites, Targets
from .._tree import Params, nodes_of, transform, wrap
from ._factors import check
from ._low_rank import LowRank


class AdaLoRA(LowRank):
    r"""$W' = W + s\,A\,\mathrm{diag}(e \odot mask)\,B$ with $s = \alpha / (r + 10^{-5})$, $r$ the rank at the start.

    Where `mask` is false, a triplet of a column of $A$, an entry of $e$ and a row of $B$ has no part in $W'$.

    Zhang et al., [AdaLoRA: Adaptive Budget Allocation](https://arxiv.org/abs/2303.10512), ICLR 2023.
    """

    a: Trainable[jax.Array, "in rank"]
    e: Trainable[jax.Array, "rank"]
    b: Trainable[jax.Array, "rank out"]
    mask: Frozen[jax.Array, "rank"]

    @property
    def left(self):
        return self.a * (self.e * self.mask.astype(self.e.dtype))[..., None, :]


def orthogonality(params: Params) -> jax.Array:
    r"""The mean of $\lVert A^T A - I \rVert_F$ and $\lVert B B^T - I \rVert_F$ over every `AdaLoRA` matrix in a tree.

    It keeps $A\,\mathrm{diag}(e)\,B$ in the form of a singular value decomposition, and is added to the loss with a
    factor, such as 0.1 (the authors) or 0.5 (Hugging Face's PEFT). Take it of the whole tree, within the loss.

    **Raises** `ValueError` if there is no `AdaLoRA` node in the tree.
    """

    def distances(rows):  # (..., rank, width)
        gram = rows @ jnp.swapaxes(rows, -1, -2)
        one = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
        return jnp.linalg.norm(gram - one, axis=(-2, -1)).ravel()

    found = nodes_of(params, AdaLoRA, "adalora").values()
    return jnp.mean(jnp.concatenate([distances(rows) for x in found for rows in (jnp.swapaxes(x.a, -1, -2), x.b)]))


@transform
def adalora(
    params: Params,
    *,
    rank: Option = 12,
    alpha: Option = None,
    dropout: Option = 0.0,
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Add a trainable term of low rank, with singular values of its own, to every targeted kernel. See `AdaLoRA`.

    **Arguments:**

    - `rank`: how many triplets there are at the start; a number, or a mapping from patterns to numbers, as are
      `alpha` and `dropout`.
    - `alpha`: the term is scaled by $s$ = `alpha / (rank + 1e-5)`, whatever is masked later. Left out, $s = 1$.
    - `dropout`: the rate at which inputs of the term are dropped, where `apply` is given a `"dropout"` key.
    - `targets`, `sites`: which kernels. By default every one but the output head.
    - `key`: for $A, B \sim N(0, 0.02^2)$, beside $e = 0$; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for a rank below one, a dropout outside `[0, 1)`, and for targets as `wrap` does.
    """

    def new(key, w, *, rank, alpha, dropout):
        check(rank, dropout)
        left, right = jax.random.split(key)
        return AdaLoRA(
            a=0.02 * jax.random.normal(left, (w.shape[0], rank)),
            e=jnp.zeros(rank),
            b=0.02 * jax.random.normal(right, (rank, w.shape[1])),
            mask=jnp.ones(rank, bool),
            scale=1.0 if alpha is None else alpha / (rank + 1e-5),
            dropout=dropout,
        )

    return wrap(params, new, targets=targets, sites=sites, key=key, rank=rank, alpha=alpha, dropout=dropout)
