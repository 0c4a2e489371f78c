"""CPT's bounds, as the last part of an optimizer."""

from typing import Any

import jax
import optax

from .._tree import nodes_of
from ..additive._cpt import CPT


def keep_bounded() -> optax.GradientTransformation:
    r"""Keep what `CPT` adds to embeddings within its bounds: the last of `optax.chain(optimizer, keep_bounded())`.

    After the update every $\delta_i$ that would be longer than $\epsilon_i$ is as long as that. Other parameters get
    the update that they were to get. `update` needs the parameters.

    **Raises** `ValueError`, when the state is made, for a tree without `CPT`, and in `update` without parameters.
    """

    def init(params):
        nodes_of(params, CPT, "cpt")
        return optax.EmptyState()

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("`keep_bounded` needs the parameters: tx.update(updates, state, params).")
        return jax.tree.map(_restrained, updates, params, is_leaf=lambda x: isinstance(x, CPT)), state

    return optax.GradientTransformation(init, update)


def _restrained(update: Any, x: Any) -> Any:
    if not isinstance(x, CPT):
        return update
    moved = x.replace(delta=x.delta + update.delta)
    return update.replace(delta=moved.bounded().delta - x.delta)
