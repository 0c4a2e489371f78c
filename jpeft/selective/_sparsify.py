"""From changes of every entry to sparse ones: the largest stay."""

import jax
import jax.numpy as jnp
import numpy as np

from .._kernel import IN, OUT, STACK, fold
from .._node import Reparam, whole
from .._tree import Params, map_nodes, nodes_of, transform
from ._delta import Delta, Dense
from ._masks import Scope, largest
from ._sparse import Sparse, listed


@transform
def sparsify(
    params: Params,
    *,
    density: float,
    scope: Scope = "all",
    rewind: Params | None = None,
    dense: bool = False,
    key: jax.Array | None = None,
) -> Params:
    r"""Keep the entries of `Dense` changes, such as those of `delta`, that are largest in size: `Sparse` nodes.

    With `rewind` it is lottery-ticket sparse fine-tuning: Ansell et al., [Composable Sparse Fine-Tuning for
    Cross-Lingual Transfer](https://arxiv.org/abs/2110.07560), ACL 2022. Again and again during training, with `dense`,
    it is child pruning by magnitude.

    **Arguments:**

    - `density`: the share of the entries that stay: of $N$ exactly $\lfloor density \cdot N \rfloor$. Those that a
      `Sparse` beneath has stay as they are, and are not chosen again.
    - `scope`: `"all"` is one ranking of all changes, `"each"` one of every matrix.
    - `rewind`: the tree as it was before training. `params` only tells which entries stay, and everything is again what
      it was, with a new head's parameters too.
    - `dense`: put `Delta` nodes whose other entries are zero in place of `Sparse` ones.
    - `key`: not used.

    **Raises** `ValueError` for a tree without `Dense` nodes, for a `rewind` of another structure, and as `mask_of` does
    for densities and changes.
    """
    start = params if rewind is None else rewind
    if jax.tree.structure(start) != jax.tree.structure(params):
        raise ValueError("`rewind` is the tree that was trained, as it was before: this one has another structure.")
    changes = nodes_of(params, Dense, "delta", nested=False)
    sizes = {name: _candidates(x) for name, x in changes.items()}
    found = iter(largest(sizes, density, scope))

    def one(x):
        change, mask = _changed(x), next(found)
        if dense:
            return Delta(base=x.base, axes=x.axes, values=jnp.where(mask, change, 0))
        if not mask.any():
            return x.base
        indices = jnp.asarray(listed(mask, STACK * x.depth + IN + OUT))
        flat = change.reshape(*change.shape[:-2], -1)
        values = jnp.take_along_axis(flat, indices, axis=-1, mode="fill", fill_value=0)
        return Sparse(base=x.base, axes=x.axes, values=values, indices=indices)

    return map_nodes(one, start, Dense, nested=False)


def _changed(node: Dense) -> jax.Array:
    """The change of every matrix: `(stack..., in, out)`."""
    return node.replace(base=None).each(lambda one: one.change)


def _candidates(node: Dense) -> np.ndarray:
    """How large the change of every entry is; -inf for what a `Sparse` beneath has."""
    sizes, below = jnp.abs(_changed(node)), node.base
    while isinstance(below, Reparam):
        if isinstance(below, Sparse):
            mark = below.replace(base=jnp.zeros(whole(node).shape), values=jnp.ones_like(below.values))
            sizes = jnp.where(fold(mark.value(), node.axes) > 0, -jnp.inf, sizes)
        below = below.base
    return np.asarray(sizes)
