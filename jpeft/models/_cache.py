"""The keys and values of tokens that were seen: what makes the next token cost one token."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array


@struct.dataclass
class Cache:
    """Slots for keys and values of every layer, filled from the first; immutable, every method returns another.

    A model's call is `reserve`, one `write` per layer, in the order of the layers, and `close`. It rides in the carry
    of a scan over layers, where XLA updates it in place.

    **Fields:**

    - `keys`, `values`: `(layers, batch, slots, key_value_heads, width)`, keys as they were rotated.
    - `positions`, `valid`: `(batch, slots)`, the position of a slot's token, and whether it is to be seen.
    - `end`: the next free slot. Whether a slot is free is not checked: the caller knows how long a cache he made.
    - `layer`: the layer that writes next.
    - `filled`: whether a call has written to it. The first call sees its own tokens alone, so it attends to them
      alone, not to all slots.
    """

    keys: Array
    values: Array
    positions: Array
    valid: Array
    end: Array
    layer: Array
    filled: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def empty(cls, layers: int, batch: int, slots: int, heads: int, width: int, dtype: Any) -> "Cache":
        """A cache without tokens."""
        zeros = lambda: jnp.zeros((layers, batch, slots, heads, width), dtype)
        zero = jnp.zeros((), jnp.int32)
        return cls(zeros(), zeros(), jnp.zeros((batch, slots), jnp.int32), jnp.zeros((batch, slots), bool), zero, zero)

    @property
    def slots(self) -> int:
        """How many there are."""
        return self.positions.shape[1]

    def grow(self, slots: int) -> "Cache":
        """With that many more slots, which are free."""
        longer = lambda x, axis: jnp.pad(x, [(0, slots if n == axis else 0) for n in range(x.ndim)])
        kept = {"keys": longer(self.keys, 2), "values": longer(self.values, 2)}
        return self.replace(**kept, positions=longer(self.positions, 1), valid=longer(self.valid, 1))

    def reserve(self, positions: Array, valid: Array) -> "Cache":
        """With the positions of the tokens (batch, count) that the layers are about to write, and their validity.

        Raises a ValueError for more tokens than slots.
        """
        count = positions.shape[1]
        if count > self.slots:
            raise ValueError(f"{count} tokens do not fit a cache of {self.slots} slots; make a longer one")
        positions, valid = jnp.broadcast_to(positions, valid.shape).astype(jnp.int32), valid.astype(bool)
        put = lambda row, new: jax.lax.dynamic_update_slice_in_dim(row, new, self.end, axis=1)
        return self.replace(positions=put(self.positions, positions), valid=put(self.valid, valid))

    def write(self, key: Array, value: Array) -> tuple[Array, Array, "Cache"]:
        """Key and value (batch, count, heads, width) of the next layer -> those that it attends to, and the cache."""
        at = (self.layer, 0, self.end, 0, 0)
        put = lambda rows, new: jax.lax.dynamic_update_slice(rows, new[None].astype(rows.dtype), at)
        cache = self.replace(keys=put(self.keys, key), values=put(self.values, value), layer=self.layer + 1)
        if not self.filled:
            return key, value, cache
        read = lambda rows, like: jax.lax.dynamic_index_in_dim(rows, self.layer, keepdims=False).astype(like.dtype)
        return read(cache.keys, key), read(cache.values, value), cache

    def close(self, count: int) -> "Cache":
        """After the layers have written `count` tokens."""
        return self.replace(end=self.end + count, layer=jnp.zeros_like(self.layer), filled=True)
