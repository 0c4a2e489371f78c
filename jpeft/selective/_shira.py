"""SHiRA: a sparse change with as many entries as a term of low rank."""

import jax
import jax.numpy as jnp

from .._targets import Option, Sites, Targets
from .._tree import Params, transform, wrap
from ._sparse import Sparse, entries, random_indices


@transform
def shira(
    params: Params,
    *,
    rank: Option = 32,
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Let $r\,(in + out)$ entries of every targeted kernel train, drawn at random: as many as LoRA has. See `Sparse`.

    Bhardwaj et al., [Sparse High Rank Adapters](https://arxiv.org/abs/2406.13175), NeurIPS 2024.

    **Arguments:**

    - `rank`: $r$; a number, or a mapping from patterns to numbers.
    - `targets`, `sites`: which kernels. By default every one but the output head.
    - `key`: for which entries; `jax.random.key(0)` if left out. They are kept in the node, and saved with it.

    **Raises** `ValueError` for a rank that asks for no entries or for more than a kernel has, and for targets as `wrap`
    does.
    """

    def new(key, w, *, rank):
        size, count = entries(w.shape), rank * sum(w.shape)
        if not 0 < count <= size:
            raise ValueError(f"Rank {rank} is {count} entries of a kernel of shape {w.shape}: it has 1 to {size}.")
        return Sparse(values=jnp.zeros(count), indices=random_indices(key, w.shape, count))

    return wrap(params, new, targets=targets, sites=sites, key=key, rank=rank)
