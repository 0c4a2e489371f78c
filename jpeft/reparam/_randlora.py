"""RandLoRA: a change of full rank, as a sum of random terms of low rank."""

import jax
import jax.numpy as jnp

from .._node import Frozen, Static, Trainable
from .._operands import Operand
from .._shared import share
from .._targets import Option, Sites, Targets
from .._tree import Params, default, transform, wrap
from ._factors import check
from ._low_rank import LowRank
from ._sizes import sizes


class RandLoRA(LowRank):
    r"""$W' = W + s \sum_k Q_k\,\mathrm{diag}(\lambda_k)\,P\,\mathrm{diag}(\gamma_k)$, or with the transposed sum.

    $P$ and all $Q_k$ are random, frozen, and the same for all nodes: each takes the parts that fit it. $P$ is at the
    narrow side of the kernel: the sum is transposed where there are no more inputs than outputs. There are as many
    terms as full rank takes.

    Albert et al., [RandLoRA: Full-rank parameter-efficient fine-tuning of large
    models](https://arxiv.org/abs/2502.00987), ICLR 2025.
    """

    narrow: Frozen[jax.Array, "rank max_narrow"]
    wide: Frozen[jax.Array, "max_terms max_wide rank"]
    inner: Trainable[jax.Array, "terms rank"]  # lambda
    outer: Trainable[jax.Array, "terms narrow"]  # gamma
    features_in: Static[int]
    features_out: Static[int]

    @property
    def left(self):
        return self.of_narrow.mT if self.features_in <= self.features_out else self.of_wide.mT

    @property
    def right(self):
        return self.of_wide if self.features_in <= self.features_out else self.of_narrow

    def branch(self, x, key):
        branch = super().branch
        return branch(x, key) if isinstance(x, Operand) else jax.checkpoint(branch)(x, key)  # or L and R would be kept

    @property
    def of_narrow(self) -> jax.Array:
        """$\\mathrm{diag}(\\lambda_k) P \\mathrm{diag}(\\gamma_k)$, all terms below each other."""
        p = self.narrow[:, : self.outer.shape[-1]]
        terms = jnp.einsum("...kr,rn,...kn->...krn", self.inner, p, self.outer)
        return terms.reshape(*terms.shape[:-3], -1, terms.shape[-1])

    @property
    def of_wide(self) -> jax.Array:
        """All $Q_k^T$ below each other."""
        size = max(self.features_in, self.features_out)
        q = self.wide[: self.inner.shape[-2], :size].mT.reshape(-1, size)
        return jnp.broadcast_to(q, (*self.inner.shape[:-2], *q.shape))


def random(key: jax.Array, shape: tuple[int, ...], sparsity: float | None) -> jax.Array:
    r"""Of variance one: $U(\pm\sqrt 3)$, or $\pm\sqrt{sparsity}$ at one place in `sparsity` and zero at others."""
    if sparsity is None:
        return jax.random.uniform(key, shape, minval=-(3**0.5), maxval=3**0.5)
    where, sign = jax.random.split(key)
    there = jax.random.bernoulli(where, 1 / sparsity, shape)
    return jnp.where(there, sparsity**0.5 * jax.random.rademacher(sign, shape, jnp.float32), 0.0)


@transform
def randlora(
    params: Params,
    *,
    rank: int = 32,
    alpha: Option = 640.0,
    sparsity: float | None = None,
    dropout: Option = 0.0,
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Add a weighted sum of random terms, together of full rank, to every targeted kernel. See `RandLoRA`.

    $P$ and $Q$ are at `params["jpeft_shared"]`, as large as the largest kernels need them.

    **Arguments:**

    - `rank`: of each random term: one number, for they are shared. The smaller it is, the more train.
    - `alpha`: the sum is scaled by $s$ = `alpha / rank`; a number, or a mapping from patterns to numbers, as is
      `dropout`.
    - `sparsity`: one entry of the random arrays in so many is not zero, and plus or minus a constant; such as 3, or
      the root of the narrower side of the kernels. Left out, they are uniform.
    - `dropout`: the rate at which inputs of the sum are dropped, where `apply` is given a `"dropout"` key.
    - `targets`, `sites`: which kernels. By default every one but the output head.
    - `key`: for $P$ and $Q$, beside $\lambda = 0$ and $\gamma$ constant; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for a rank or a sparsity below one, a dropout outside `[0, 1)`, and for targets as `wrap`
    does.
    """
    check(rank)
    if sparsity is not None and sparsity < 1:
        raise ValueError(f"One entry in `sparsity` is not zero: at least 1, not {sparsity}.")
    found = sizes(params, targets, sites).values()
    max_narrow, max_wide = max(map(min, found)), max(map(max, found))
    terms = lambda narrow: -(-narrow // rank)
    left, right = jax.random.split(default(key))
    narrow = random(left, (rank, max_narrow), sparsity)
    wide = random(right, (terms(max_narrow), max_wide, rank), sparsity)
    params, refs = share(params, randlora_narrow=narrow, randlora_wide=wide)

    def new(key, w, *, alpha, dropout):
        check(rank, dropout)
        count = terms(min(w.shape))
        return RandLoRA(
            narrow=refs["randlora_narrow"],
            wide=refs["randlora_wide"],
            inner=jnp.zeros((count, rank)),
            outer=jnp.full((count, min(w.shape)), 1 / max(count, min(w.shape)), jnp.float32),
            features_in=w.shape[0],
            features_out=w.shape[1],
            scale=alpha / rank,
            dropout=dropout,
        )

    return wrap(params, new, targets=targets, sites=sites, key=key, alpha=alpha, dropout=dropout)
