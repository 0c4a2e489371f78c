"""Checksums of arrays, computed where they are."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._lazy import read


def checksum(x: jax.Array) -> str:
    """16 hexadecimal digits that tell whether two arrays have the same bits, in the same places.

    Two sums modulo $2^{32}$ of a mix of every element's bits with its place. They are the same for every order of
    summation, so for every sharding and any number of processes. A change of one element always changes them; other
    accidents go unseen with a chance of about $2^{-64}$. They are no defence against someone who wants to deceive.

    **Raises** `TypeError` for a typed PRNG key: it is `jax.random.key_data` that has bits to compare.
    """
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        raise TypeError(f"An array of {x.dtype} is none of numbers: keep `jax.random.key_data` of it.")
    return "".join(f"{int(s):08x}" for s in np.asarray(_sums(x)))


def same(x: Any, y: Any) -> bool:
    """Whether two trees have one structure, and at every place one array, or two with the same bits."""
    (xs, of_x), (ys, of_y) = jax.tree.flatten(x), jax.tree.flatten(y)
    kind = lambda a: (a.shape, jnp.dtype(a.dtype))
    alike = lambda a, b: a is b or (kind(a) == kind(b) and checksum(read(a)) == checksum(read(b)))
    return of_x == of_y and all(map(alike, xs, ys))


@jax.jit
def _sums(x: jax.Array) -> jax.Array:
    bits = _bits(x)
    place = jnp.uint32(0)
    for axis, size in enumerate(bits.shape):
        place = place * jnp.uint32(size & 0xFFFFFFFF) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    once = _mix(bits * jnp.uint32(0x9E3779B1) + _mix(place))
    again = _mix(bits * jnp.uint32(0x27D4EB2F) + _mix(place + jnp.uint32(0x165667B1)))
    return jnp.stack([jnp.sum(once, dtype=jnp.uint32), jnp.sum(again, dtype=jnp.uint32)])


def _bits(x: jax.Array) -> jax.Array:
    """The elements' bits as `uint32`; 64-bit ones are two, on an axis of their own."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    size = min(jax.dtypes.itemsize_bits(x.dtype), 32)
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{size}")).astype(jnp.uint32)


def _mix(h: jax.Array) -> jax.Array:
    """MurmurHash3's finalizer, a bijection: <https://github.com/aappleby/smhasher/wiki/MurmurHash3>."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
