"""Trainable tokens: some rows of an embedding."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from .._node import Reparam, Static, Trainable, widened
from .._targets import TABLE, Sites, Targets
from .._tree import Params, transform, wrap


class Tokens(Reparam):
    """$E'$ is the table $E$ with the rows of `ids` replaced by `rows`, wherever the model uses the table."""

    rows: Trainable[jax.Array, "tokens out"]
    ids: Static[tuple[int, ...]]

    def weight(self, w):
        return w.at[jnp.array(self.ids)].set(self.rows)


@transform
def tokens(
    params: Params,
    *,
    ids: Sequence[int],
    targets: Targets = TABLE,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    """Let the embeddings of some tokens train, such as those added for a task. See `Tokens`.

    An output head that is tied to the table sees them, too.

    **Arguments:**

    - `ids`: of the tokens. The table must have their rows.
    - `targets`, `sites`: which tables, by default those of token embeddings, found by their usual names.
    - `key`: not used: the rows start as they are.

    **Raises** `ValueError` for no ids, for those that occur twice or are outside of the table, and for targets as
    `wrap` does.
    """
    ids = tuple(int(n) for n in ids)
    twice = sorted({n for n in ids if ids.count(n) > 1})
    if not ids or twice:
        raise ValueError(f"Each of at least one token trains once: twice in `ids` are {twice}.")

    def new(key, w, *, ids):
        outside = [n for n in ids if not 0 <= n < w.shape[0]]
        if outside:
            raise ValueError(f"A table of {w.shape[0]} rows has none for the tokens {outside}.")
        return Tokens(rows=widened(w[jnp.array(ids)]), ids=ids)

    return wrap(params, new, targets=targets, sites=sites, key=key, ids=ids)
