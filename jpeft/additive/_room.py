"""Room for a prompt: more positions in all that a model takes, and not in what it returns."""

import contextvars
import functools
import inspect
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._context import setting
from .._node import Additive, Static, value
from ..models._loss import IGNORED


class Opened(NamedTuple):
    """What the prompts inside a `Room` or a `Template` have to know."""

    length: int = 0  # how many positions there are before the tokens
    cached: bool = False  # whether there are none because a cache has the prompts
    ids: Any = None  # the token ids, with those positions
    decodes: bool = False  # whether a decoder's ids may go through the same embedding
    tasks: Any = None  # (batch,) of every example
    keep: bool = False  # whether results keep the positions of prompts
    places: Mapping[int, jax.Array] = MappingProxyType({})  # of the tokens that prompts take the places of

    def has(self, ids: jax.Array) -> bool:
        """Whether these ids are those that prompts belong to: not a decoder's, where there is an encoder."""
        return ids is self.ids or not self.decodes


_opened: contextvars.ContextVar[Opened | None] = contextvars.ContextVar("opened", default=None)
opened = _opened.get
opening = functools.partial(setting, _opened)


class Room(Additive):
    """`length` positions before those of the tokens, in all that a model takes, and not in what it returns.

    Masks let them be attended to, position ids move up by `length`, type ids repeat the first token's, all segments see
    them, and a cache gets slots for them. Of results, those that have the sequence as the second of three axes or more
    are cut back to the tokens, and with labels those of two axes, too: losses. Caches are not cut. A call with
    `keep_prompt=True` cuts nothing.

    A cache that has been filled has the prompt: later calls pass, their position ids moved up. Where there is a
    decoder, what is its own is left as it is: the prompt is the encoder's.
    """

    length: Static[int]
    limit: Static[int | None] = None  # the most positions that the model has embeddings for
    tasks: Static[bool] = False  # whether the model is called with `task_ids` (batch,) for the prompts

    @property
    def ahead(self):
        return self.length

    def around(self, call, key, *args, **kwargs):
        keep = kwargs.pop("keep_prompt", (opened() or Opened()).keep)
        outer = entered(self.tasks, kwargs)._replace(keep=keep)
        given = inspect.signature(call).bind(*args, **kwargs)
        cache = given.arguments.get("cache")
        if cache is not None and cache.filled:
            if given.arguments.get("position_ids") is not None:
                given.arguments["position_ids"] = given.arguments["position_ids"] + self.length  # it may be NumPy's
            with opening(outer._replace(length=0, cached=True)):
                return call(*given.args, **given.kwargs)
        decodes, theirs = decoders(given)
        ids, total = self._widen(given.arguments, theirs)
        room = outer._replace(length=outer.length + self.length, ids=given.arguments[ids], decodes=decodes)
        with opening(room):
            y = call(*given.args, **given.kwargs)
        if decodes or keep:
            return y
        least = 2 if given.arguments.get("labels") is not None else 3
        is_cache = lambda x: cache is not None and isinstance(x, type(cache))
        fits = lambda x: not is_cache(x) and getattr(x, "ndim", 0) >= least and x.shape[1] == total
        return jax.tree.map(lambda x: x[:, self.length :] if fits(x) else x, y, is_leaf=is_cache)

    def _widen(self, arguments: dict[str, Any], theirs: list[str]) -> tuple[str, int]:
        """Widen all `arguments` but `theirs`; return the name of the token ids, and how many there are then."""
        arrays = arrays_of(arguments, theirs)
        ids = token_ids(arrays)
        tokens = arrays[ids].shape[1]
        check_limit(tokens, self.length, self.limit)
        text = arrays[ids]
        arguments |= {name: _widened(name, x, tokens, self.length) for name, x in arrays.items()}
        if (first := _first(text, arrays)) is not None:  # padding may be without a position
            arguments[ids] = jnp.concatenate([jnp.repeat(first, self.length, axis=1), text], axis=1)
        if "cache" in arguments and "cache" not in theirs and arguments["cache"] is not None:
            arguments["cache"] = arguments["cache"].grow(self.length)
        return ids, tokens + self.length


def entered(tasks: bool, kwargs: dict[str, Any]) -> Opened:
    """What prompts know so far, with the `task_ids` that are taken out of a call's arguments, where it has `tasks`."""
    outer = opened() or Opened()
    return outer._replace(tasks=kwargs.pop("task_ids", outer.tasks)) if tasks else outer


def decoders(given: inspect.BoundArguments) -> tuple[bool, list[str]]:
    """Whether a model has a decoder beside an encoder, and the names of the arguments that are the decoder's."""
    decodes = any(name.startswith("decoder_") for name in given.signature.parameters)
    return decodes, [name for name in given.arguments if decodes and re.match("decoder_|labels|cache", name)]


def arrays_of(arguments: Mapping[str, Any], theirs: list[str]) -> dict[str, jax.Array]:
    """The arrays among a call's arguments, but for `theirs`."""
    return {n: x for n, x in arguments.items() if hasattr(x, "dtype") and hasattr(x, "ndim") and n not in theirs}


def token_ids(arrays: Mapping[str, jax.Array]) -> str:
    """The name of the token ids; **raises** `ValueError` where there are none."""
    ids = next((n for n, x in arrays.items() if x.ndim == 2 and jnp.issubdtype(x.dtype, jnp.integer)), None)
    if ids is None:
        raise ValueError("A prompt stands before token ids (batch, sequence), and this model is called with none.")
    return ids


def is_mask(name: str) -> bool:
    """Whether an argument tells what is attended to."""
    return "mask" in name and name not in FRONT


def masks_of(ids: jax.Array, arrays: Mapping[str, jax.Array]) -> list[jax.Array]:
    """The masks of tokens among arrays, bool (batch, tokens)."""
    return [x.astype(bool) for name, x in arrays.items() if is_mask(name) and x.shape == ids.shape]


def _first(ids: jax.Array, arrays: Mapping[str, jax.Array]) -> jax.Array | None:
    """The first of each row's ids (batch, 1) that is no padding, where there is a mask."""
    masks = masks_of(ids, arrays)
    return jnp.take_along_axis(ids, jnp.argmax(masks[0], axis=1)[:, None], axis=1) if masks else None


def _widened(name: str, x: jax.Array, tokens: int, length: int) -> jax.Array:
    """An argument with `length` places before those of the tokens on each axis of theirs."""
    before = lambda axis: [(length if n == axis else 0, 0) for n in range(x.ndim)]
    if is_mask(name):
        attend = 0 if jnp.issubdtype(x.dtype, jnp.floating) and x.ndim > 2 else 1  # added to scores, or multiplied
        if x.ndim > 2 and x.shape[-2] == tokens:  # the prompt sees the prompt alone
            hidden = jnp.finfo(x.dtype).min if attend == 0 else 0
            x = jnp.pad(x, before(x.ndim - 2), constant_values=hidden)
        return jnp.pad(x, before(x.ndim - 1), constant_values=attend) if x.shape[-1] == tokens else x
    if x.ndim != 2 or x.shape[1] != tokens:
        if tokens in x.shape[1:]:
            raise ValueError(f"A prompt has no room in the argument {name!r} of shape {x.shape}: no mask and no ids.")
        return x
    if "position" in name:
        front = jnp.broadcast_to(jnp.arange(length, dtype=x.dtype)[None], (x.shape[0], length))
        return jnp.concatenate([front, x + length], axis=1)
    if name in FRONT:
        return jnp.pad(x, before(1), constant_values=FRONT[name])
    return jnp.pad(x, before(1), mode="edge")


FRONT = {"labels": IGNORED, "loss_mask": 0, "segment_ids": -1}  # of no segment, but seen by all


def positions(leaves: Mapping[str, Any]) -> dict[str, int]:
    """The tables of positions among parameters, by name, and how many positions they have."""
    tables = [n for n in leaves if re.search("position|wpe", n) and "relative" not in n]
    shapes = {n: jax.eval_shape(value, leaves[n]).shape for n in tables}
    return {n: shape[0] for n, shape in shapes.items() if len(shape) == 2}


def check_limit(tokens: int, length: int, limit: int | None) -> None:
    """**Raises** `ValueError` where a model has not as many positions as a prompt and the tokens."""
    if limit is not None and tokens + length > limit:
        raise ValueError(
            f"{tokens} tokens and a prompt of {length} are {tokens + length} positions: the model has {limit}. "
            "Shorten the sequences or the prompt."
        )
