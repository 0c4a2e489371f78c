"""BERT's encoder, and a classifier on top of it."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ._layers import MLP, Attention, Norm, apply_layers


_ACTIVATIONS = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}

# Fields of a config.json that change the computation when they say anything but this.
_FIXED = {
    "model_type": "bert",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
}

# Fields that do not: training, task heads, special tokens, memory, and how the file was written.
_HARMLESS = frozenset(
    """
    attention_probs_dropout_prob hidden_dropout_prob classifier_dropout initializer_range layerdrop
    gradient_checkpointing use_cache chunk_size_feed_forward torchscript torch_dtype dtype transformers_version
    output_attentions output_hidden_states output_past return_dict tie_word_embeddings
    architectures id2label label2id num_labels problem_type finetuning_task task_specific_params
    pad_token_id bos_token_id eos_token_id sep_token_id cls_token_id mask_token_id tokenizer_class language
    directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type
    """.split()  # noqa: SIM905
)


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The numbers that make a BERT encoder, under the names and with the defaults of Hugging Face's `BertConfig`.

    Raises a ValueError for an activation that is not known, or heads that do not divide `hidden_size`.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        if self.hidden_act not in _ACTIVATIONS:
            raise ValueError(f"hidden_act={self.hidden_act!r} is not supported; supported: {', '.join(_ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is no multiple of {self.num_attention_heads=}")

    @classmethod
    def from_huggingface(cls, fields: Mapping[str, Any]) -> "EncoderConfig":
        """The config that a Hugging Face `config.json` describes.

        Raises a ValueError that names every field whose value, or whose meaning, this encoder does not have.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        refused = [f"{name}={fields[name]!r} (only {value!r})" for name, value in _FIXED.items()
                   if name in fields and fields[name] != value]  # fmt: skip
        refused += [f"{name}={value!r} (not a known field)" for name, value in fields.items()
                    if name not in known | _HARMLESS | _FIXED.keys() and not name.startswith("_")]  # fmt: skip
        if refused:
            raise ValueError(f"config fields that this encoder does not support: {'; '.join(refused)}")
        return cls(**{name: fields[name] for name in known & fields.keys()})


class Embeddings(nn.Module):
    """`norm(word[input_ids] + position[position_ids] + token_type[token_type_ids])`."""

    config: EncoderConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, input_ids: Array, token_type_ids: Array, position_ids: Array) -> Array:
        """Three integer arrays (batch or 1, seq) -> (batch, seq, d)."""
        config, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        embed = partial(nn.Embed, features=config.hidden_size, **dtypes)
        x = embed(config.vocab_size, name="word")(input_ids)
        x += embed(config.max_position_embeddings, name="position")(position_ids)
        x += embed(config.type_vocab_size, name="token_type")(token_type_ids)
        return Norm(config.layer_norm_eps, centered=True, param_dtype=self.param_dtype, name="norm")(x)


class EncoderLayer(nn.Module):
    """`x = attention_norm(x + attention(x))`, then `mlp_norm(x + mlp(x))`: the norms come after the sums."""

    config: EncoderConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array | None) -> Array:
        """x (batch, seq, d), mask bool (batch, 1, 1, seq) -> (batch, seq, d)."""
        config, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(Norm, config.layer_norm_eps, centered=True, param_dtype=self.param_dtype)
        heads = config.num_attention_heads
        attention = Attention(heads, heads, use_bias=True, name="attention", **dtypes)
        activation = _ACTIVATIONS[config.hidden_act]
        mlp = MLP(config.intermediate_size, activation, gated=False, use_bias=True, name="mlp", **dtypes)
        x = norm(name="attention_norm")(x + attention(x, mask))
        return norm(name="mlp_norm")(x + mlp(x))


class Encoder(nn.Module):
    """BERT's encoder without dropout (https://arxiv.org/abs/1810.04805).

    `scan` keeps the layers' parameters stacked on a leading axis and compiles one layer; `remat` recomputes each layer
    in the backward pass. `dtype` is what is computed in (None: the parameters'), `param_dtype` what is stored.
    """

    config: EncoderConfig
    scan: bool = False
    remat: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
    ) -> Array:
        """The last hidden state (batch, seq, d) of integer arrays (batch, seq).

        `attention_mask` is 1 at tokens and 0 at padding (left out: no padding); `token_type_ids` default to 0,
        `position_ids` to 0, 1, ... Raises a ValueError for a sequence longer than `max_position_embeddings`.
        """
        config, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        length, limit = input_ids.shape[-1], config.max_position_embeddings
        if length > limit:
            raise ValueError(f"the sequence has {length} tokens, max_position_embeddings is {limit}: truncate it")
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids)
        if position_ids is None:
            position_ids = jnp.arange(length)[None]
        mask = None if attention_mask is None else jnp.asarray(attention_mask, bool)[:, None, None, :]
        x = Embeddings(config, name="embeddings", **dtypes)(input_ids, token_type_ids, position_ids)
        layer = partial(EncoderLayer, config=config, **dtypes)
        return apply_layers(layer, config.num_hidden_layers, x, mask, scan=self.scan, remat=self.remat)


class Classifier(nn.Module):
    """Logits of a pooled encoding: `head(pool(encoder(input_ids)))`.

    `pooling="mean"` averages the tokens that `attention_mask` keeps, as sentence-transformers does; `"cls"` is BERT's
    pooler, `tanh(pooler(x[:, 0]))`. Raises a ValueError for another.
    """

    config: EncoderConfig
    num_labels: int
    pooling: Literal["mean", "cls"] = "mean"
    scan: bool = False
    remat: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
    ) -> Array:
        """The arguments of `Encoder` -> float32 logits (batch, num_labels)."""
        if self.pooling not in ("mean", "cls"):
            raise ValueError(f"pooling={self.pooling!r} is not supported; supported: 'mean', 'cls'")
        encoder = Encoder(self.config, self.scan, self.remat, self.dtype, self.param_dtype, name="encoder")
        x = encoder(input_ids, attention_mask, token_type_ids, position_ids)
        dense = partial(nn.Dense, param_dtype=self.param_dtype)
        if self.pooling == "cls":
            pooled = jnp.tanh(dense(self.config.hidden_size, dtype=self.dtype, name="pooler")(x[:, 0]))
        else:
            kept = jnp.ones_like(input_ids) if attention_mask is None else jnp.asarray(attention_mask, bool)
            kept = kept.astype(jnp.float32)[:, :, None]
            # A row of padding alone has no mean: zero, as a NaN would spoil the whole batch's loss.
            pooled = jnp.sum(kept * x.astype(jnp.float32), axis=1) / jnp.maximum(jnp.sum(kept, axis=1), 1.0)
        return dense(self.num_labels, dtype=jnp.float32, name="head")(pooled)
