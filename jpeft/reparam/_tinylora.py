"""TinyLoRA: a few numbers for many kernels."""

import jax
import jax.numpy as jnp

from .._node import Frozen, Trainable
from .._shared import share
from .._targets import Option, Sites, Targets, kernels, options
from .._tree import Params, transform, wrap
from ..selective._unfreeze import Free
from ._factors import check
from ._low_rank import LowRank
from ._singular import check_part, principal


class TinyLoRA(LowRank):
    r"""$W' = W + A \left(\sum_n v_n P_n\right) B$ with $A = U_r \sqrt{\Sigma_r}$ and $B = \sqrt{\Sigma_r} V_r^T$.

    All $P_n$ are random and frozen. Only $v$ trains, and many kernels may share one.

    Morris et al., [Learning to Reason in 13 Parameters](https://arxiv.org/abs/2602.04118), 2026.
    """

    a: Frozen[jax.Array, "in rank"]
    p: Frozen[jax.Array, "length rank rank"]
    b: Frozen[jax.Array, "rank out"]
    v: Trainable[jax.Array, "length"]

    @property
    def right(self):
        return jnp.einsum("...n,...nij->...ij", self.v, self.p) @ self.b


@transform
def tinylora(
    params: Params,
    *,
    rank: Option = 2,
    length: int = 64,
    group: Option = None,
    dropout: Option = 0.0,
    iterations: int | None = None,
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Train a vector that weighs random directions between the first singular vectors of kernels. See `TinyLoRA`.

    **Arguments:**

    - `rank`: how many singular vectors; a number, or a mapping from patterns to numbers, as is `dropout`.
    - `length`: of every $v$.
    - `group`: a name, or a mapping from patterns to names: kernels, and layers of a stack, of one name share one $v$,
      at `params["jpeft_shared"]`. `None` is for kernels and layers that have each a $v$ of its own.
    - `dropout`: the rate at which inputs of the term are dropped, where `apply` is given a `"dropout"` key.
    - `iterations`: of a randomized decomposition, such as 4; by default the exact one.
    - `targets`, `sites`: which kernels. By default every one but the output head.
    - `key`: for $P \sim N(0, 1/r)$, beside $v = 0$, and the randomized decomposition; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for a rank below one or above a kernel's, a length below one, a dropout outside `[0, 1)`,
    and for targets as `wrap` does.
    """
    if length < 1:
        raise ValueError(f"TinyLoRA needs a vector of at least one number, not of {length=}.")
    chosen = options({"group": group}, list(kernels(params, targets, sites)))
    names = dict.fromkeys(x["group"] for x in chosen.values() if x["group"] is not None)
    vectors = {f"tinylora_{name}": Free(array=jnp.zeros(length)) for name in names}
    params, refs = share(params, **vectors) if vectors else (params, {})

    def new(key, w, *, rank, group, dropout):
        check(rank, dropout)
        check_part(w, rank)
        outer, inner = jax.random.split(key)
        a, b = principal(outer, w.astype(jnp.float32), rank, iterations)
        p = jax.random.normal(inner, (length, rank, rank)) / rank**0.5
        v = jnp.zeros(length) if group is None else refs[f"tinylora_{group}"]
        return TinyLoRA(a=a, p=p, b=b, v=v, dropout=dropout)

    return wrap(params, new, targets=targets, sites=sites, key=key, rank=rank, group=group, dropout=dropout)
