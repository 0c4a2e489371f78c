"""A prefix that starts as the keys and values that a model has of a text."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .._apply import apply, sites
from .._node import Additive, Trainable, is_node, widened
from .._targets import Targets
from .._tree import Params, combine, nodes_of, partition, place
from ..places import KEYS_AND_VALUES
from ._prefix import put_prefix, where_keys_pass
from ._prefix_nodes import Prefix, apart
from ._room import Room


class Tap(Additive):
    """Changes nothing: the gradients of its arrays are the keys and values of the first text that passes."""

    keys: Trainable[jax.Array]
    values: Trainable[jax.Array]
    passed: Trainable[jax.Array]  # its gradient: how many keys and values have passed

    def inputs(self, key, value, *args):
        if apart():
            return key, value, *args
        return _tapped(key, self.keys, self.passed), _tapped(value, self.values, self.passed), *args


@jax.custom_vjp
def _tapped(x: jax.Array, tap: jax.Array, passed: jax.Array) -> jax.Array:
    return x


def _tapped_forward(x, tap, passed):
    return x, widened(x[0])


def _tapped_backward(found, g):
    return g, found, jnp.ones(())


_tapped.defvjp(_tapped_forward, _tapped_backward)


def init_prefix(
    model: nn.Module, params: Params, input_ids: jax.Array, *, targets: Targets = KEYS_AND_VALUES, **others: Any
) -> Params:
    """`prefix` that starts as the keys and values that the model has of a text: as if the text stood before the tokens.

    So it is, to rounding, in a decoder without sliding windows and relative positions. Elsewhere it is a start.

    **Arguments:**

    - `model`: takes token ids.
    - `input_ids`: of the text, `(length,)`. It is not padded.
    - `targets`: as for `prefix`.
    - `others`: of the call on the text, as the `decoder_input_ids`, `(1, length)`, of an encoder-decoder, of which it
      takes the keys and values of the decoder's own attention.

    **Raises** `ValueError` for a model that has a prompt, and where keys and values do not pass just once.
    """
    if any(isinstance(x, Room) for x in jax.tree.leaves(params, is_leaf=is_node)):
        raise ValueError("The text would stand behind a prompt, and the prefix before it: call `init_prefix` first.")
    ids = jnp.asarray(input_ids)[None]
    found = where_keys_pass(targets, sites(model, {"params": params}, ids, **others))
    start = {path: jnp.zeros((*call.stack, *call.shape[1:])) for path, call in found.items()}
    passed = {path: jnp.zeros(call.stack) for path, call in found.items()}
    tapped = place(params, {path: Tap(keys=x, values=x, passed=passed[path]) for path, x in start.items()}, "tap")
    trainable, frozen = partition(tapped)

    def outputs(trainable):
        y = apply(model, {"params": combine(trainable, frozen)}, ids, allow_unused=True, **others)
        return sum((jnp.sum(widened(x)) for x in jax.tree.leaves(y) if jnp.issubdtype(x.dtype, jnp.floating)), 0.0)

    taps = nodes_of(jax.grad(outputs)(trainable), Tap)
    once = lambda x: isinstance(x.passed, jax.core.Tracer) or np.all(x.passed == 2)
    if wrong := [path for path, x in taps.items() if not once(x)]:
        raise ValueError(
            f"The model's outputs are to depend on keys and values that pass once, and do not at {wrong}: no gradient "
            "comes back, or layers share parameters."
        )
    nodes = {path.rpartition("/")[0]: Prefix(keys=x.keys, values=x.values) for path, x in taps.items()}
    return put_prefix(params, nodes, ids.shape[1])
