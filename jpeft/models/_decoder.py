"""A causal decoder: Llama, Mistral, Qwen, Gemma, Phi-3, SmolLM, GPT-2 and Mixtral, which differ in their configs."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from ._cache import Cache
from ._decoder_config import DecoderConfig
from ._experts import MixtureOfExperts
from ._layers import ACTIVATIONS, MLP, Attention, Norm, apply_layers
from ._loss import next_token_losses
from ._masks import causal_masks, check_mask, default_positions
from ._rotary import rotations


class DecoderLayer(nn.Module):
    """`x += attention(attention_norm(x))`, then `x += mlp(mlp_norm(x))`: the norms come first."""

    config: DecoderConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, masks: Array, turns: tuple[Array, Array] | None, reach: Any, *, cache: Cache | None = None
    ) -> Any:
        """x (batch, seq, d) -> the same; with a cache -> that and the cache. The layer's mask is `masks[reach]`."""
        config, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = _norm(config, self.param_dtype)
        attention = Attention(
            config.num_attention_heads,
            config.num_key_value_heads,
            use_bias=config.attention_bias,
            out_bias=config.attention_out_bias,
            head_dim=config.head_dim,
            fused=config.fused,
            qk_norm=norm if config.qk_norm else None,
            scale=(config.query_pre_attn_scalar or config.width) ** -0.5,
            softcap=config.attn_logit_softcapping,
            name="attention",
            **dtypes,
        )
        y = norm(name="attention_norm")(x)
        y = attention(y, masks[reach], turns and tuple(array[reach] for array in turns), cache)
        y, cache = (y, None) if cache is None else y
        if config.post_norms:
            y = norm(name="attention_post_norm")(y)
        x += y

        activation = ACTIVATIONS[config.hidden_act]
        if config.num_experts:
            mlp = MixtureOfExperts(
                config.num_experts,
                config.num_experts_per_tok,
                config.moe_intermediate_size or config.intermediate_size,
                activation,
                normalize=config.norm_topk_prob,
                name="moe",
                **dtypes,
            )
        else:
            mlp = MLP(
                config.intermediate_size,
                activation,
                gated=config.gated,
                use_bias=config.mlp_bias,
                fused=config.fused,
                name="mlp",
                **dtypes,
            )
        y = mlp(norm(name="mlp_norm")(x))
        if config.post_norms:
            y = norm(name="mlp_post_norm")(y)
        x += y
        return x if cache is None else (x, cache)


class Decoder(nn.Module):
    """A causal decoder: a Llama (https://arxiv.org/abs/2302.13971), except where its config says otherwise.

    `scan` keeps the layers' parameters stacked on a leading axis and compiles one layer; `remat` is what `apply_layers`
    takes. `dtype` is what is computed in (None: the parameters'), `param_dtype` what is stored.
    """

    config: DecoderConfig
    scan: bool = False
    remat: bool | str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        segment_ids: Array | None = None,
        labels: Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """Next-token logits, float32 (batch, seq, vocab), of integer arrays (batch, seq).

        Args:
          attention_mask: 1 at tokens and 0 at padding, on either side.
          position_ids: left out, 0, 1, ..., padding included; from 0 again in every segment, and on from the end of a
            cache.
          segment_ids: of several texts in a row: a token sees those of its own segment.
          labels: if given, losses are returned instead, float32 (batch, seq): at t the cross-entropy of predicting
            `labels[:, t]` from the tokens before t; 0 where the label is -100, and at the first token of a segment.
          cache: of `init_cache`, or what the last call returned. These tokens, and `attention_mask`, come after those
            that it has; the logits and the cache with them are returned.

        Raises a ValueError for more tokens than a table has positions, or a cache slots, for a mask of other tokens,
        and for a cache together with labels or segments.
        """
        config, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        length, limit = input_ids.shape[1], config.max_position_embeddings
        if config.learned_positions and length > limit:
            raise ValueError(f"the sequence has {length} tokens, max_position_embeddings is {limit}: truncate it")
        check_mask(attention_mask, input_ids)
        if position_ids is None:
            position_ids = default_positions(length, segment_ids, cache)
        if cache is not None:
            if labels is not None or segment_ids is not None:
                raise ValueError("a cache goes with neither `labels` nor `segment_ids`: call without it")
            cache = cache.reserve(position_ids, jnp.ones_like(input_ids) if attention_mask is None else attention_mask)

        embed = nn.Embed(config.vocab_size, config.hidden_size, name="embed", **dtypes)
        x = embed(input_ids)
        if config.scale_embeddings:
            x *= jnp.asarray(config.hidden_size**0.5, x.dtype)
        if config.learned_positions:
            x += nn.Embed(limit, config.hidden_size, name="position", **dtypes)(position_ids)

        reaches = list(dict.fromkeys(config.reaches))  # most models have one for all layers, Gemma has two
        masks = causal_masks([r.window for r in reaches], position_ids, attention_mask, segment_ids, cache)
        turns = None if config.learned_positions else rotations(reaches, position_ids, config.rotary_width)
        x = apply_layers(
            partial(DecoderLayer, config=config, **dtypes), config.num_hidden_layers,
            x, masks, turns, each=[np.array([reaches.index(r) for r in config.reaches])],
            cache=cache, scan=self.scan, remat=self.remat,
        )  # fmt: skip
        x, cache = (x, None) if cache is None else x
        x = _norm(config, self.param_dtype)(name="norm")(x)

        if config.tie_word_embeddings:
            head, project = embed, nn.Embed.attend
        else:
            head, project = nn.Dense(config.vocab_size, use_bias=False, name="lm_head", **dtypes), nn.Dense.__call__

        def logits(head: nn.Module, x: Array) -> Array:
            y, cap = project(head, x).astype(jnp.float32), config.final_logit_softcapping
            return y if cap is None else cap * jnp.tanh(y / cap)

        if labels is not None:
            return next_token_losses(head, logits, x, labels, segment_ids, config.vocab_size)
        return logits(head, x) if cache is None else (logits(head, x), cache.close(length))

    def init_cache(self, batch: int, length: int, dtype: Any = None) -> Cache:
        """An empty cache for `length` tokens of each of `batch` texts. It needs no parameters."""
        config, dtype = self.config, dtype or self.dtype or self.param_dtype
        return Cache.empty(config.num_hidden_layers, batch, length, config.num_key_value_heads, config.width, dtype)


def _norm(config: DecoderConfig, param_dtype: Any) -> partial:
    centered = config.norm == "layer"
    return partial(Norm, config.rms_norm_eps, centered=centered, offset=config.norm_offset, param_dtype=param_dtype)
