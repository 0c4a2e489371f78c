"""SpIEL: sparse changes whose places move while they train."""

import jax
import jax.numpy as jnp

from .._targets import Option, Sites, Targets
from .._tree import Params, transform, wrap
from ._sparse import Sparse, entries, random_indices


@transform
def spiel(
    params: Params,
    *,
    density: Option = 0.01,
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    """Let random entries of every targeted kernel train, for `jpeft.optim.reselect` to move. See `Sparse`.

    Ansell et al., [Scaling Sparse Fine-Tuning to Large Language Models](https://arxiv.org/abs/2401.16405), 2024.

    **Arguments:**

    - `density`: the share of each matrix's entries, at least one of them; a number, or a mapping from patterns to
      numbers.
    - `targets`, `sites`: which kernels. By default every one but the output head.
    - `key`: for the choice; `jax.random.key(0)` if left out. The changes start at zero.

    **Raises** `ValueError` for a density outside `(0, 1]`, for a matrix of $2^{31}$ entries or more, and for targets as
    `wrap` does.
    """

    def new(key, w, *, density):
        if not 0 < density <= 1:
            raise ValueError(f"A density is in (0, 1], not {density}.")
        count = max(1, round(density * entries(w.shape)))
        return Sparse(values=jnp.zeros(count), indices=random_indices(key, w.shape, count))

    return wrap(params, new, targets=targets, sites=sites, key=key, density=density)
