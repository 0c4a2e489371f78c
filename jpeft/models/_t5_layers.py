"""The layers of T5, of its encoder and of its decoder."""

import dataclasses
import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from ._cache import Cache
from ._layers import ACTIVATIONS, MLP, Attention, Norm, apply_layers
from ._masks import causal_masks, default_positions
from ._t5_cache import T5Cache


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The numbers that make a T5, under the names and with the defaults of Hugging Face's `T5Config`.

    T5 1.1 and Flan-T5 are "gated-gelu", with `tie_word_embeddings` and `scale_decoder_outputs` false. Raises a
    ValueError for a feed-forward block that is not known, or buckets that are not even.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None  # as many as the encoder has
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"  # or "gated-", and an activation
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool = True
    decoder_start_token_id: int = 0
    pad_token_id: int = 0
    model_type: str = "t5"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"feed_forward_proj={self.feed_forward_proj!r} is not supported; supported: {known}, and "
                             "these after 'gated-'")  # fmt: skip
        if self.relative_attention_num_buckets % 4:
            raise ValueError(f"{self.relative_attention_num_buckets=} is no multiple of 4")

    @property
    def gated(self) -> bool:
        """Whether the feed-forward block has a gate."""
        return self.feed_forward_proj.startswith("gated-")

    @property
    def activation(self) -> str:
        """Of the feed-forward block; the checkpoints of "gated-gelu" are of the tanh approximation."""
        name = self.feed_forward_proj.removeprefix("gated-")
        return "gelu_new" if self.gated and name == "gelu" else name


class Embedded(nn.Module):
    """The embedded tokens, which it returns: it is a module for the sake of what stands beside modules, as prompts do.

    The table is shared by the encoder and the decoder, so that beside it one cannot tell whose tokens these are.
    """

    def __call__(self, x: Array) -> Array:
        """x (batch, seq, d)."""
        return x


class T5Layer(nn.Module):
    """`x += block(norm(x))` of self-attention, of attention to the encoder's output if there is any, and of the MLP."""

    config: T5Config
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        bias: Array,
        source: Array | None = None,
        source_mask: Array | None = None,
        *,
        cache: T5Cache | None = None,
    ) -> Any:
        """x (batch, seq, d), bias (batch or 1, heads, seq, keys), source (batch, source, d), source_mask (batch, 1, 1,
        source) -> x; with a cache -> that and the cache."""
        config, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(Norm, config.layer_norm_epsilon, centered=False, param_dtype=self.param_dtype)
        heads = partial(Attention, config.num_heads, config.num_heads, use_bias=False, head_dim=config.d_kv, **dtypes)

        def attend(name: str, x: Array, mask: Array | None, cache: Cache | None, context: Array | None = None) -> tuple:
            # Without a scale: it is in how the checkpoints' queries were initialized.
            y = heads(scale=1.0, name=name)(norm(name=f"{name}_norm")(x), mask, cache=cache, context=context)
            y, cache = (y, None) if cache is None else y
            return x + y, cache

        tokens, memory = (None, None) if cache is None else (cache.tokens, cache.source)
        x, tokens = attend("attention", x, bias, tokens)
        if source is not None:
            x, memory = attend("cross_attention", x, source_mask, memory, source)
        activation = ACTIVATIONS[config.activation]
        mlp = MLP(config.d_ff, activation, gated=config.gated, use_bias=False, name="mlp", **dtypes)
        x += mlp(norm(name="mlp_norm")(x))
        return x if cache is None else (x, T5Cache(tokens, memory))


class T5Stack(nn.Module):
    """The layers of the encoder, or of the decoder (`causal`), which have one table of biases by distance together."""

    config: T5Config
    causal: bool
    scan: bool = False
    remat: bool | str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        mask: Array | None = None,
        source: Array | None = None,
        source_mask: Array | None = None,
        cache: T5Cache | None = None,
    ) -> Any:
        """x (batch, seq, d), mask (batch, seq) -> hidden states (batch, seq, d); with a cache -> them and the cache."""
        config, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = Embedded(name="embedded")(x)
        tokens = None if cache is None else cache.tokens
        queries = default_positions(x.shape[1], None, tokens)[0]
        keys = queries if tokens is None or not tokens.filled else jnp.arange(tokens.slots)
        count = config.relative_attention_num_buckets
        table = nn.Embed(count, config.num_heads, name="relative_attention_bias", **dtypes)
        bias = table(_buckets(config, keys[None, :] - queries[:, None], self.causal))  # (seq, keys, heads)
        bias = jnp.moveaxis(bias, -1, 0)[None].astype(jnp.float32)
        if self.causal:
            seen = causal_masks([None], queries[None], mask, cache=tokens)[0]
        else:
            seen = None if mask is None else mask.astype(bool)[:, None, None, :]
        if seen is not None:
            bias = jnp.where(seen, bias, jnp.finfo(jnp.float32).min)
        layer = partial(T5Layer, config=config, **dtypes)
        count = (config.num_decoder_layers or config.num_layers) if self.causal else config.num_layers
        source_mask = None if source_mask is None else source_mask.astype(bool)[:, None, None, :]
        how = {"cache": cache, "scan": self.scan, "remat": self.remat}
        x = apply_layers(layer, count, x, bias, source, source_mask, **how)
        x, cache = (x, None) if cache is None else x
        x = Norm(config.layer_norm_epsilon, centered=False, param_dtype=self.param_dtype, name="norm")(x)
        return x if cache is None else (x, cache)


def _buckets(config: T5Config, distance: Array, causal: bool) -> Array:
    """The number of the bias for a key that is `distance` after its query, negative before: integers of any shape.

    Half of the buckets are for distances of their own, half for ranges that grow, up to `max_distance`. Where keys come
    on both sides, those after the query have the second half of all.
    """
    buckets, limit = config.relative_attention_num_buckets, config.relative_attention_max_distance
    count = buckets if causal else buckets // 2
    exact = count // 2
    # As transformers computes it, in float32: rounding decides at the ranges' ends.
    far = np.log(np.arange(exact, limit + 1, dtype=np.float32) / exact) / np.float32(math.log(limit / exact))
    far = exact + (far * (count - exact)).astype(np.int32)
    bucket = np.concatenate([np.arange(exact), np.minimum(far, count - 1)]).astype(np.int32)
    near = jnp.asarray(bucket)[jnp.minimum(jnp.abs(distance), limit)]
    return jnp.where(distance > 0, 0 if causal else count + near, near)
