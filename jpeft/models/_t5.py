"""T5: an encoder, and a decoder that reads what it has made of the text."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ._cache import Cache
from ._loss import IGNORED, chunked_cross_entropy
from ._masks import check_mask
from ._t5_cache import T5Cache
from ._t5_layers import T5Config, T5Stack


class T5(nn.Module):
    """T5 (https://arxiv.org/abs/1910.10683) and T5 1.1 (https://arxiv.org/abs/2002.05202), without dropout.

    `scan`, `remat`, `dtype` and `param_dtype` are those of `Encoder`.
    """

    config: T5Config
    scan: bool = False
    remat: bool | str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        decoder_input_ids: Array | None = None,
        decoder_attention_mask: Array | None = None,
        labels: Array | None = None,
        cache: T5Cache | None = None,
    ) -> Any:
        """Logits of the decoder's next tokens, float32 (batch, target, vocab).

        Args:
          input_ids: integers (batch, seq), as is attention_mask, which is 1 at tokens and 0 at padding, on either side.
          decoder_input_ids: (batch, target), as is decoder_attention_mask; they start with `decoder_start_token_id`.
            Left out, they are the labels moved one to the right.
          labels: instead of logits, losses are returned, float32 (batch, target): at t the cross-entropy of predicting
            `labels[:, t]`, 0 where the label is -100.
          cache: of `init_cache`, or what another call returned: logits and the cache with these tokens, too, are
            returned. The first call fills it with the encoder's keys and values; later ones need `decoder_input_ids`
            alone, and the mask of these.

        Raises a ValueError for arguments that do not make a call.
        """
        config, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if decoder_input_ids is None and labels is None:
            raise ValueError("decoder_input_ids is missing: begin with decoder_start_token_id, or give labels")
        if cache is not None and labels is not None:
            raise ValueError("a cache is for generating text: call without it for labels")
        if input_ids is None and not (cache is not None and cache.filled):
            raise ValueError("input_ids is missing: only a cache that a call has returned does without")
        if decoder_input_ids is None:
            decoder_input_ids = self.shift_right(labels)
        check_mask(attention_mask, input_ids)
        check_mask(decoder_attention_mask, decoder_input_ids)
        embed = nn.Embed(config.vocab_size, config.d_model, name="shared", **dtypes)
        stack = partial(T5Stack, config, scan=self.scan, remat=self.remat, **dtypes)
        x = embed(decoder_input_ids)
        if cache is None or not cache.filled:
            source = stack(causal=False, name="encoder")(embed(input_ids), attention_mask)
        else:
            source, attention_mask = x[:, :0], cache.source.valid  # nothing new: all of it is in the cache
        if cache is not None:
            if not cache.filled:
                memory = self._empty_cache(*input_ids.shape, source.dtype)
                memory = memory.reserve(jnp.arange(input_ids.shape[1])[None], _valid(attention_mask, input_ids))
                cache = cache.replace(source=memory)
            cache = cache.reserve(_valid(decoder_attention_mask, decoder_input_ids))
        x = stack(causal=True, name="decoder")(x, decoder_attention_mask, source, attention_mask, cache)
        x, cache = (x, None) if cache is None else x
        if config.scale_decoder_outputs:
            x *= jnp.asarray(config.d_model**-0.5, x.dtype)
        if config.tie_word_embeddings:
            head, project = embed, nn.Embed.attend
        else:
            head, project = nn.Dense(config.vocab_size, use_bias=False, name="lm_head", **dtypes), nn.Dense.__call__
        logits = lambda head, x: project(head, x).astype(jnp.float32)
        if labels is not None:
            return chunked_cross_entropy(head, logits, x, labels, config.vocab_size)
        return logits(head, x) if cache is None else (logits(head, x), cache.close(decoder_input_ids.shape[1]))

    def shift_right(self, labels: Array) -> Array:
        """The decoder's tokens, of which it is to predict the labels (batch, target)."""
        tokens = jnp.where(labels == IGNORED, self.config.pad_token_id, labels)
        return jnp.pad(tokens[:, :-1], [(0, 0), (1, 0)], constant_values=self.config.decoder_start_token_id)

    def init_cache(self, batch: int, length: int, dtype: Any = None) -> T5Cache:
        """An empty cache for `length` of the decoder's tokens in each of `batch` texts; it needs no parameters."""
        return T5Cache(self._empty_cache(batch, length, dtype or self.dtype or self.param_dtype))

    def _empty_cache(self, batch: int, length: int, dtype: Any) -> Cache:
        config = self.config
        layers = config.num_decoder_layers or config.num_layers
        return Cache.empty(layers, batch, length, config.num_heads, config.d_kv, dtype)


class T5Encoder(nn.Module):
    """The encoder of a T5 alone; its fields are those of `T5`."""

    config: T5Config
    scan: bool = False
    remat: bool | str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, input_ids: Array, attention_mask: Array | None = None) -> Array:
        """Two integer arrays (batch, seq) -> the last hidden state (batch, seq, d)."""
        config, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.Embed(config.vocab_size, config.d_model, name="shared", **dtypes)(input_ids)
        return T5Stack(config, False, self.scan, self.remat, name="encoder", **dtypes)(x, attention_mask)


def _valid(mask: Array | None, input_ids: Array) -> Array:
    return jnp.ones(input_ids.shape, bool) if mask is None else mask.astype(bool)
