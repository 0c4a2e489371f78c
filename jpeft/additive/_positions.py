"""Positions of a prompt: its first and its last tokens, whatever padding there is, and none while decoding."""

import contextvars
import functools
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._context import setting
from .._node import Additive
from ..models._loss import IGNORED
from ._room import opened


class Ranks(NamedTuple):
    """How many tokens of its prompt come before each token, and how many behind it: `(batch, tokens)`.

    `NONE` for tokens of no prompt.
    """

    before: jax.Array
    behind: jax.Array


NONE = jnp.iinfo(jnp.int32).max

_ranks: contextvars.ContextVar[Ranks | None] = contextvars.ContextVar("ranks", default=None)
told = functools.partial(setting, _ranks)  # within it, a call with a cache is of tokens with these ranks


def chosen(first: int, last: int, shape: tuple[int, ...]) -> jax.Array:
    """Which of the hidden states of shape `(batch, seq, features)` are of the `first` or the `last` tokens of a prompt.

    **Raises** `ValueError` for hidden states of other tokens than the model is called with.
    """
    ranks, room = _ranks.get(), opened()
    soft = 0 if room is None else room.length
    if ranks is None or len(shape) != 3 or shape[:2] != (len(ranks.before), soft + ranks.before.shape[1]):
        known = "no tokens" if ranks is None else f"tokens {ranks.before.shape}"
        raise ValueError(
            f"Hidden states of shape {shape} have no positions: the module that takes the mask has been called with "
            f"{known}. `within=` names that module; or take `positions='all'`."
        )
    return jnp.pad((ranks.before < first) | (ranks.behind < last), [(0, 0), (soft, 0)])


class Positions(Additive):
    """Stands beside the module that takes the mask, and tells those inside which tokens are the prompt's.

    They are all that the mask has 1 for, in every segment; of a call with `labels (batch, tokens)` those before the
    first token that is to be predicted; or what the model is called with as `prompt_mask (batch, tokens)`. In a call
    with a cache that has been filled there are none.
    """

    def around(self, call, key, *args, **kwargs):
        mask = kwargs.pop("prompt_mask", None)
        given = inspect.signature(call).bind(*args, **kwargs)
        if given.arguments.get("cache") is not None and _ranks.get() is not None:
            return call(*args, **kwargs)
        with told(ranks_of(*_prompt(given.arguments, mask))):
            return call(*args, **kwargs)


def _prompt(arguments: Mapping[str, Any], mask: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """Which tokens of a call are the prompt's, bool (batch, tokens), and the segments that they are of."""
    if others := [name for name in arguments if name.startswith("decoder_")]:
        raise ValueError(f"This model has two sequences ({others[0]!r}): `within=` names the module that takes one.")
    room, cache = opened(), arguments.get("cache")
    own = lambda x: x if x is None or room is None else x[:, room.length :]  # a prompt of embeddings has no tokens
    arrays = {name: x for name, x in arguments.items() if getattr(x, "ndim", 0) > 1}
    shape = own(next(iter(arrays.values()))).shape[:2]
    segments, labels = own(arrays.get("segment_ids")), own(arrays.get("labels"))
    masks = {name: x for name, x in arrays.items() if "mask" in name}
    if cache is not None and cache.filled:
        return jnp.zeros(shape, bool), segments
    if mask is not None:
        return mask.astype(bool), segments
    if wide := {name: x.shape for name, x in masks.items() if x.ndim > 2}:
        raise ValueError(f"These masks do not tell where padding is: {wide}. Give the call a `prompt_mask` as well.")
    real = own(next(iter(masks.values()))).astype(bool) if masks else jnp.ones(shape, bool)
    if labels is None or labels.shape != shape:
        return real, segments
    predicted = (labels != IGNORED) & (_before(real, segments) > 0)  # nothing predicts the first token
    return real & ~predicted & (_before(predicted, segments) == 0), segments


def ranks_of(prompt: jax.Array, segments: jax.Array | None = None) -> Ranks:
    """The ranks of tokens of prompts, bool (batch, tokens), each within its segment."""
    flip = lambda x: None if x is None else jnp.flip(x, axis=1)
    behind = flip(_before(flip(prompt), flip(segments)))
    return Ranks(*(jnp.where(prompt, x, NONE) for x in (_before(prompt, segments), behind)))


def _before(marked: jax.Array, segments: jax.Array | None) -> jax.Array:
    """How many of the marked tokens of its segment come before each token."""
    count = jnp.cumsum(marked, axis=1, dtype=jnp.int32) - marked.astype(jnp.int32)
    if segments is None:
        return count
    starts = jnp.pad(segments[:, 1:] != segments[:, :-1], [(0, 0), (1, 0)])
    return count - jax.lax.cummax(jnp.where(starts, count, 0), axis=1)
