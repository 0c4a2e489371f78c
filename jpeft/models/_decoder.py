"""A causal decoder in the manner of Llama."""

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ._layers import MLP, Attention, Norm, apply_layers


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The numbers that make a decoder, under the names of Hugging Face's `LlamaConfig`.

    Raises a ValueError for heads that do not divide `hidden_size` into even widths, or groups that do not divide heads.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(f"hidden_size={self.hidden_size} is no multiple of twice {self.num_attention_heads=}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"{self.num_attention_heads=} is no multiple of {self.num_key_value_heads=}")


class DecoderLayer(nn.Module):
    """`x += attention(attention_norm(x))`, then `x += mlp(mlp_norm(x))`: the norms come first."""

    config: DecoderConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array, angles: Array) -> Array:
        """x (batch, seq, d), mask bool (batch or 1, 1, seq, seq), angles (batch or 1, seq, 1, head_width / 2)."""
        config, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(Norm, config.rms_norm_eps, centered=False, param_dtype=self.param_dtype)
        heads, key_value_heads = config.num_attention_heads, config.num_key_value_heads
        attention = Attention(heads, key_value_heads, use_bias=False, name="attention", **dtypes)
        mlp = MLP(config.intermediate_size, jax.nn.silu, gated=True, use_bias=False, name="mlp", **dtypes)
        x += attention(norm(name="attention_norm")(x), mask, angles)
        return x + mlp(norm(name="mlp_norm")(x))


class Decoder(nn.Module):
    """A causal decoder: RMSNorm first, rotary positions, grouped-query attention, SwiGLU.

    `scan`, `remat`, `dtype` and `param_dtype` are those of `Encoder`. Source: https://arxiv.org/abs/2302.13971.
    """

    config: DecoderConfig
    scan: bool = False
    remat: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, input_ids: Array, attention_mask: Array | None = None, position_ids: Array | None = None
    ) -> Array:
        """Next-token logits, float32 (batch, seq, vocab), of integer arrays (batch, seq).

        `attention_mask` is 1 at tokens and 0 at padding, on either side. `position_ids` default to 0, 1, ..., which
        count the padding too; attention sees differences of positions only.
        """
        config, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        length = input_ids.shape[-1]
        if position_ids is None:
            position_ids = jnp.arange(length)[None]
        mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
        if attention_mask is not None:
            mask &= jnp.asarray(attention_mask, bool)[:, None, None, :]
        embed = nn.Embed(config.vocab_size, config.hidden_size, name="embed", **dtypes)
        layer = partial(DecoderLayer, config=config, **dtypes)
        x, angles = embed(input_ids), _angles(config, position_ids)
        x = apply_layers(layer, config.num_hidden_layers, x, mask, angles, scan=self.scan, remat=self.remat)
        x = Norm(config.rms_norm_eps, centered=False, param_dtype=self.param_dtype, name="norm")(x)
        if config.tie_word_embeddings:
            logits = embed.attend(x)
        else:
            logits = nn.Dense(config.vocab_size, use_bias=False, name="lm_head", **dtypes)(x)
        return logits.astype(jnp.float32)


def _angles(config: DecoderConfig, position_ids: Array) -> Array:
    """`position * theta^(-2i / width)` for i = 0, 1, ..., width / 2 - 1: (batch or 1, seq, 1, width / 2)."""
    width = config.hidden_size // config.num_attention_heads
    frequencies = config.rope_theta ** -(jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    return position_ids[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
