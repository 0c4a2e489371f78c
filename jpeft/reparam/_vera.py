"""VeRA: vector-based random matrix adaptation."""

import jax
import jax.numpy as jnp

from .._node import Frozen, Static, Trainable
from .._shared import share
from .._targets import Option, Sites, Targets
from .._tree import Params, default, transform, wrap
from ._factors import check, uniform
from ._low_rank import LowRank
from ._sizes import sizes


class VeRA(LowRank):
    r"""$W' = W + A_{:in}\,\mathrm{diag}(d)\,B_{:,:out}\,\mathrm{diag}(b)$; all nodes share one random $A$ and $B$.

    Kopiczko et al., [VeRA: Vector-based Random Matrix Adaptation](https://arxiv.org/abs/2310.11454), ICLR 2024.
    """

    project_a: Frozen[jax.Array, "max_in rank"]
    project_b: Frozen[jax.Array, "rank max_out"]
    d: Trainable[jax.Array, "rank"]
    b: Trainable[jax.Array, "out"]
    features_in: Static[int]

    @property
    def left(self):
        return jnp.einsum("ir,...r->...ir", self.project_a[: self.features_in], self.d)

    @property
    def right(self):
        return jnp.einsum("ro,...o->...ro", self.project_b[:, : self.b.shape[-1]], self.b)


@transform
def vera(
    params: Params,
    *,
    rank: int = 256,
    d_initial: float = 0.1,
    dropout: Option = 0.0,
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Scale the inside and the outputs of one random term of low rank that all targeted kernels share. See `VeRA`.

    $A$ and $B$ are at `params["jpeft_shared"]`, as wide as the widest kernel; each kernel takes the part that fits it.

    **Arguments:**

    - `rank`: the inner dimension of $A B$: one number, for they are shared.
    - `d_initial`: the start of $d$, beside $b = 0$.
    - `dropout`: the rate at which inputs of the term are dropped, where `apply` is given a `"dropout"` key. A number,
      or a mapping from patterns to numbers.
    - `targets`, `sites`: which kernels. By default every one but the output head.
    - `key`: for $A \sim U(\pm\sqrt{6/max\_in})$ and $B \sim U(\pm\sqrt{6/r})$; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for a rank below one, a dropout outside `[0, 1)`, and for targets as `wrap` does.
    """
    check(rank)
    max_in, max_out = map(max, zip(*sizes(params, targets, sites).values(), strict=True))
    left, right = jax.random.split(default(key))
    a, b = uniform(left, (max_in, rank), max_in), uniform(right, (rank, max_out), rank)
    params, refs = share(params, vera_a=6**0.5 * a, vera_b=6**0.5 * b)

    def new(key, w, *, dropout):
        check(rank, dropout)
        d, b = jnp.full(rank, d_initial, jnp.float32), jnp.zeros(w.shape[1])
        shared = {"project_a": refs["vera_a"], "project_b": refs["vera_b"]}
        return VeRA(**shared, d=d, b=b, features_in=w.shape[0], dropout=dropout)

    return wrap(params, new, targets=targets, sites=sites, key=key, dropout=dropout)
