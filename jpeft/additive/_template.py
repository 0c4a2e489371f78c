"""Places for a prompt inside the text: those of a token that stands for it."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from .._node import Additive, Static
from ._positions import ranks_of
from ._room import arrays_of, decoders, entered, masks_of, opening, token_ids


@struct.dataclass
class Counted:
    """A cache, and how many placeholders there are in the tokens that it has seen. Else it is as the cache is."""

    cache: Any
    count: jax.Array  # (batch,)

    def __getattr__(self, name):
        return getattr(object.__getattribute__(self, "cache"), name)


class Template(Additive):
    """The tokens `placeholder` are places of a prompt, in their order in each segment; what a mask hides is none.

    Nothing changes its shape. A cache is returned with the number of placeholders that it has seen, so that the tokens
    may come in several calls. Where there is a decoder, they are the encoder's.
    """

    placeholder: Static[int]
    length: Static[int]  # how many there are to be
    tasks: Static[bool] = False  # whether the model is called with `task_ids` (batch,) for the prompts

    def around(self, call, key, *args, **kwargs):
        outer = entered(self.tasks, kwargs)
        given = inspect.signature(call).bind(*args, **kwargs)
        decodes, theirs = decoders(given)
        cache, before = given.arguments.get("cache"), jnp.zeros(1, jnp.int32)
        if isinstance(cache, Counted):
            given.arguments["cache"], before = cache.cache, cache.count
        if decodes and cache is not None and cache.filled:  # the encoder has read the text
            with opening(outer._replace(ids=None, decodes=True)):
                return call(*given.args, **given.kwargs)
        arrays = arrays_of(given.arguments, theirs)
        name = token_ids(arrays)
        ids = given.arguments[name] = jnp.array(arrays[name])  # a copy: a decoder may be given the same
        if cache is None or decodes:
            self._check(ids.shape[1] - outer.length)
        own = self._own(ids, outer.length, arrays)
        nth = jnp.where(own, before[:, None] + ranks_of(own, arrays.get("segment_ids")).before, -1)
        places = {**outer.places, self.placeholder: nth}
        with opening(outer._replace(ids=ids, decodes=decodes, places=places)):
            y = call(*given.args, **given.kwargs)
        if cache is None or decodes:
            return y
        count = before + jnp.sum(own, axis=1, dtype=jnp.int32)
        is_cache = lambda x: isinstance(x, Counted | type(given.arguments["cache"]))
        return jax.tree.map(lambda x: Counted(x, count) if is_cache(x) else x, y, is_leaf=is_cache)

    def _own(self, ids: jax.Array, length: int, arrays: Mapping[str, jax.Array]) -> jax.Array:
        """Which ids are places (batch, tokens): none of those that a prompt has put before, and none that is masked."""
        own = (ids == self.placeholder) & (jnp.arange(ids.shape[1]) >= length)[None]
        return functools.reduce(jnp.logical_and, masks_of(ids, arrays), own)

    def _check(self, tokens: int) -> None:
        if tokens < self.length:
            raise ValueError(
                f"Prompts of {self.length} embeddings take the places of the token {self.placeholder}, and there are "
                f"{tokens} tokens. Put the token into the text once for every embedding, or shorten the prompt."
            )
