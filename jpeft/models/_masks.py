"""Who sees whom in causal attention."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from ._cache import Cache


def causal_masks(
    windows: Sequence[int | None],
    position_ids: Array,
    attention_mask: Array | None = None,
    segment_ids: Array | None = None,
    cache: Cache | None = None,
) -> Array:
    """A mask for each window, bool (windows, batch or 1, 1, seq, keys), True where a key is seen.

    A token sees itself and those before it: of its segment, that the mask has 1 for, whose position is less than the
    window behind its own.

    Args:
      windows: None is without bound.
      position_ids: (batch or 1, seq), growing within a segment.
      attention_mask, segment_ids: (batch, seq). Below 0 is what all segments see, such as a prompt before them.
      cache: with room reserved for the tokens. If it is filled, the keys are its slots: its mask and positions hold.
    """
    queries = keys = jnp.arange(position_ids.shape[1])
    key_positions = position_ids
    if cache is not None and cache.filled:
        keys, key_positions, attention_mask = jnp.arange(cache.slots), cache.positions, cache.valid
        queries += cache.end
    seen = (keys[None, :] <= queries[:, None])[None]
    if attention_mask is not None:
        seen &= attention_mask.astype(bool)[:, None, :]
    if segment_ids is not None:
        seen &= (segment_ids[:, :, None] == segment_ids[:, None, :]) | (segment_ids < 0)[:, None, :]
    behind = position_ids[:, :, None] - key_positions[:, None, :]
    masks = jnp.broadcast_arrays(*(seen if window is None else seen & (behind < window) for window in windows))
    return jnp.stack(masks)[:, :, None]


def check_mask(attention_mask: Array | None, input_ids: Array | None) -> None:
    """Raises a ValueError for a mask of more or fewer tokens than the call has."""
    if attention_mask is None or input_ids is None or attention_mask.shape[-1] == input_ids.shape[-1]:
        return
    raise ValueError(
        f"the mask is of {attention_mask.shape[-1]} tokens, and the call of {input_ids.shape[-1]}: a cache keeps the "
        "mask of the tokens before, so that only that of the new ones is given"
    )


def default_positions(length: int, segment_ids: Array | None, cache: Cache | None) -> Array:
    """0, 1, ... (batch or 1, length), on from the end of a cache, and from 0 again in every segment.

    Where something before the segments is seen by all of them, numbered below 0, each goes on from its end.
    """
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    if cache is not None:
        positions += cache.end
    if segment_ids is not None:
        starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], [(0, 0), (1, 0)])
        positions -= jax.lax.cummax(jnp.where(starts, positions, 0), axis=1)
        positions += jnp.where(segment_ids < 0, 0, jnp.sum(segment_ids < 0, axis=1, keepdims=True, dtype=jnp.int32))
    return positions
