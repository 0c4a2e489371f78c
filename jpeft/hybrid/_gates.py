"""Gates: a number for every example, which a method's part in it is multiplied with; and where they are kept."""

import contextvars
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from .._context import setting
from .._node import Additive, Static, Trainable, widened
from ..additive._hidden import Hidden
from ..additive._prefix_nodes import apart
from ..models._cache import Cache


UNKNOWN = -1.0  # of a gate in a cache


class Scope(NamedTuple):
    """What gates have to know of the call that they are in."""

    mask: jax.Array | None = None  # (batch, seq), 1 at the tokens that they are averaged over
    caches: bool = False  # whether the model is called with a cache
    known: jax.Array | None = None  # (slots, batch), those of the layer that the cache has
    found: dict[int, jax.Array] | None = None  # those of the layer in this call, by slot


OUTSIDE = Scope()

_scope: contextvars.ContextVar[Scope] = contextvars.ContextVar("scope", default=OUTSIDE)
_prefix: contextvars.ContextVar[jax.Array | None] = contextvars.ContextVar("prefix", default=None)


class Gate(NamedTuple):
    r"""$g = \mathrm{mean}_t\, \sigma(h_t w + b)$, over the tokens of an example."""

    kernel: jax.Array  # (features,)
    bias: jax.Array  # ()
    slot: int  # where the cache has it

    def __call__(self, h: jax.Array) -> jax.Array:
        """h (batch, ..., features) -> (batch,), in float32 at least. Of an example without tokens it is 0."""
        scope, wide = _scope.get(), widened(h)
        if apart() and self.slot in (scope.found or {}):  # attention to something else, beside that to the tokens
            return jnp.maximum(scope.found[self.slot], 0.0)
        each = jax.nn.sigmoid(wide @ self.kernel.astype(wide.dtype) + self.bias.astype(wide.dtype))
        gate = _mean(each, scope.mask)
        if scope.caches:
            if scope.known is None:
                raise ValueError(
                    "A gate outside of the blocks of layers has no place in the cache: leave its module out of "
                    "`targets`, or call the model without a cache."
                )
            known = scope.known[self.slot].astype(gate.dtype)
            gate = jnp.where(known == UNKNOWN, gate, known)
        if scope.found is not None:
            scope.found[self.slot] = gate
        return jnp.maximum(gate, 0.0)


def _mean(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Over all axes but the first; where there is a mask, over its tokens, and `UNKNOWN` where it has none."""
    if mask is None:
        return jnp.mean(x, axis=range(1, x.ndim))
    ahead = x.shape[1] - mask.shape[1]  # a prompt before the tokens
    weights = jnp.pad(mask, [(0, 0), (ahead, 0)], constant_values=1).astype(x.dtype)
    count = jnp.sum(weights, axis=1)
    return jnp.where(count > 0, jnp.sum(x * weights, axis=1) / jnp.maximum(count, 1), UNKNOWN)


class Gated(Hidden):
    r"""$f(h) = g\,f_0(h)$, where $f_0$ is that of another `Hidden`, and $g$ a `Gate` of $h$: one number an example.

    Mao et al., [UniPELT](https://arxiv.org/abs/2110.07577), ACL 2022.
    """

    inner: Trainable[Any]
    gate: Trainable[jax.Array, "in"]
    gate_bias: Trainable[jax.Array, ""]
    slot: Static[int] = 0

    @property
    def random(self):
        return self.inner.random

    def change(self, h, key):
        gate = Gate(self.gate, self.gate_bias, self.slot)(h)
        y = self.inner.change(h, key)
        return y * gate.reshape(-1, *[1] * (y.ndim - 1)).astype(y.dtype)


class PrefixGate(Additive):
    """A `Gate` of what goes into an attention, for the `GatedPrefix` inside."""

    gate: Trainable[jax.Array, "in"]
    gate_bias: Trainable[jax.Array, ""]
    slot: Static[int] = 0

    def around(self, call, key, *args, **kwargs):
        h = args[0] if args else next(iter(kwargs.values()))
        with setting(_prefix, Gate(self.gate, self.gate_bias, self.slot)(h)):
            return call(*args, **kwargs)


class GatedPrefix(Additive):
    """The first `length` keys and values are multiplied with the attention's `PrefixGate`."""

    length: Static[int]

    def output(self, y, *args):
        if apart():
            return y
        keys, values, mask = y  # (batch, keys, heads, width) twice
        gate = _prefix.get()[:, None, None, None]
        times = lambda x: x.at[:, : self.length].multiply(gate.astype(x.dtype))
        return times(keys), times(values), mask


@struct.dataclass
class GatedCache(Cache):
    """A `Cache` that has the gates, too.

    **Fields:**

    - `gates`: `(layers, slots, batch)`; below zero where no token of the row has been seen.
    """

    gates: jax.Array | None = None


class Gates(Additive):
    """Stands beside the model, and tells its gates the mask; and has the model's cache keep them.

    They are averaged over the tokens of `gate_mask` `(batch, seq)`, which a call may have, or else over those of
    `attention_mask`. With a cache they are those of the first call in which a row has tokens.
    """

    count: Static[int]  # of a layer
    over_padding: Static[bool] = False  # whether the mean without a `gate_mask` is over padding, too

    def around(self, call, key, *args, **kwargs):
        mask = kwargs.pop("gate_mask", None)
        given = inspect.signature(call).bind(*args, **kwargs)
        if any(name.startswith("decoder_") for name in given.signature.parameters):
            raise ValueError("Gates are for a model of one stack of layers: this one has an encoder and a decoder.")
        if mask is None and not self.over_padding:
            mask = given.arguments.get("attention_mask")
        if mask is not None and mask.ndim != 2:
            raise ValueError(f"The mask has the shape {mask.shape}: give `gate_mask` (batch, seq), for the gates.")
        cache = given.arguments.get("cache")
        if cache is not None and not isinstance(cache, Cache):
            raise ValueError(f"Gates are kept in a `Cache`, which {type(cache).__name__} is not.")
        if cache is not None and not isinstance(cache, GatedCache):
            gates = jnp.full((cache.keys.shape[0], self.count, cache.keys.shape[1]), UNKNOWN)
            fields = {field: getattr(cache, field) for field in cache.__dataclass_fields__}
            given.arguments["cache"] = GatedCache(**fields, gates=gates)
        with setting(_scope, Scope(mask, caches=cache is not None)):
            return call(*given.args, **given.kwargs)


class LayerGates(Additive):
    """Stands beside a block of layers, and keeps its gates in the cache that goes through it."""

    count: Static[int]

    def around(self, call, key, *args, **kwargs):
        cache, found = kwargs.get("cache"), {}
        known = None if cache is None else cache.gates[cache.layer]
        with setting(_scope, _scope.get()._replace(known=known, found=found)):
            result = call(*args, **kwargs)
        if cache is None:
            return result
        y, after = result
        gates = jnp.stack([found.get(n, known[n]) for n in range(self.count)])
        return y, after.replace(gates=after.gates.at[cache.layer].set(gates.astype(known.dtype)))
