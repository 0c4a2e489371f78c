"""Multi-head attention: of queries grouped over fewer keys, with a cache, and with a place for trained prefixes."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ._cache import Cache
from ._rotary import rotate


class KeysAndValues(nn.Module):
    """What attention compares its queries with, and what it reads there; without parameters.

    It returns its arguments: it is a module for the sake of what stands beside modules, as tuned prefixes do.
    """

    def __call__(self, key: Array, value: Array, mask: Array | None) -> tuple[Array, Array, Array | None]:
        """key, value (batch, keys, key_value_heads, width), mask as `attend` takes it."""
        return key, value, mask


class Attention(nn.Module):
    """`out(attend(query(x), key(x), value(x)))`.

    Fields:
      heads, key_value_heads: how many, the former a multiple of the latter.
      use_bias: of query, key and value; and of the output, where `out_bias` is left out.
      head_dim: width of a head; left out, that of x divided by the heads.
      fused: query, key and value are one matrix `qkv`, in this order.
      qk_norm: makes the norm of each head's query, and that of its key, before they are rotated.
      scale, softcap: as `attend` takes them.
    """

    heads: int
    key_value_heads: int
    use_bias: bool
    head_dim: int | None = None
    out_bias: bool | None = None
    fused: bool = False
    qk_norm: Callable[..., nn.Module] | None = None
    scale: float | None = None
    softcap: float | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        mask: Array | None = None,
        rotation: tuple[Array, Array] | None = None,
        cache: Cache | None = None,
        context: Array | None = None,
    ) -> Any:
        """x (batch, seq, d) -> (batch, seq, d); with a cache -> that and the cache, which has the new keys.

        mask as `attend` takes it, rotation as `rotate` does; context (batch, keys, d) is what is attended to, x itself
        where it is left out. It has no positions: its keys are not rotated.
        """
        dense = partial(nn.Dense, use_bias=self.use_bias, dtype=self.dtype, param_dtype=self.param_dtype)
        width = self.head_dim or x.shape[-1] // self.heads
        if self.fused:
            sizes = self.heads * width, self.key_value_heads * width
            qkv = dense(sizes[0] + 2 * sizes[1], name="qkv")
            parts = lambda x: jnp.split(qkv(x), [sizes[0], sum(sizes)], axis=-1)
            query, key, value = parts(x)
            if context is not None:
                _, key, value = parts(context)
        else:
            source = x if context is None else context
            query = dense(self.heads * width, name="query")(x)
            key = dense(self.key_value_heads * width, name="key")(source)
            value = dense(self.key_value_heads * width, name="value")(source)
        query, key, value = (y.reshape(*y.shape[:-1], y.shape[-1] // width, width) for y in (query, key, value))
        if self.qk_norm is not None:
            query, key = self.qk_norm(name="query_norm")(query), self.qk_norm(name="key_norm")(key)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation) if context is None else key
        if cache is not None:
            key, value, cache = cache.write(key, value)
        key, value, mask = KeysAndValues(name="kv")(key, value, mask)
        y = attend(query, key, value, mask, scale=self.scale, softcap=self.softcap)
        out_bias = self.use_bias if self.out_bias is None else self.out_bias
        y = dense(x.shape[-1], use_bias=out_bias, name="out")(y.reshape(*y.shape[:2], -1))
        return y if cache is None else (y, cache)


def attend(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Array:
    """`softmax(scale query key^T + mask) value`, the softmax in float32.

    query (batch, seq, heads, width); key and value (batch, keys, groups, width), each for heads / groups heads; mask
    (batch or 1, heads or 1, seq or 1, keys): bool, True where a key is seen, or numbers that are added. `scale` is
    1 / sqrt(width) where left out; `softcap` bounds the scores, `softcap tanh(scores / softcap)`.

    `jax.nn.dot_product_attention` computes the same, but mixes bfloat16 with float32, which strict promotion refuses.
    Source: https://arxiv.org/abs/1706.03762, and https://arxiv.org/abs/2305.13245 for the groups.
    """
    batch, length, heads, width = query.shape
    groups = key.shape[2]
    scale = 1 / math.sqrt(width) if scale is None else scale
    query = query.reshape(batch, length, groups, heads // groups, width)
    scores = scale * jnp.einsum("bqghw,bkgw->bghqk", query, key, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if mask is not None:
        mask = mask.reshape(mask.shape[0], groups if mask.shape[1] > 1 else 1, -1, *mask.shape[2:])
        if mask.dtype == bool:
            # Not -inf: a row that sees nothing, as left padding does, would be NaN.
            scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        else:
            scores += mask.astype(jnp.float32)
    weights = jax.nn.softmax(scores).astype(value.dtype)
    return jnp.einsum("bghqk,bkgw->bqghw", weights, value).reshape(batch, length, heads, width)
