"""The encoder of BERT, RoBERTa, DistilBERT and MiniLM."""

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from jax import Array

from ._layers import ACTIVATIONS, MLP, Attention, Norm, apply_layers


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The numbers that make an encoder, under the names and with the defaults of Hugging Face's `BertConfig`.

    `type_vocab_size` is 0 where tokens have no types (DistilBERT). With `padding_idx`, positions are counted from
    `padding_idx + 1` at the tokens that are not `padding_idx` (RoBERTa); without, they are 0, 1, ... `pooler_act` is
    the activation after the pooler.

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
    model_type: str = "bert"
    padding_idx: int | None = None
    pooler_act: str = "tanh"

    def __post_init__(self) -> None:
        check_sizes(self)

    @property
    def max_length(self) -> int:
        """The most tokens of a sequence: some rows of the table of positions may be out of reach."""
        return self.max_position_embeddings - (0 if self.padding_idx is None else self.padding_idx + 1)


def check_sizes(config: Any) -> None:
    """Raises a ValueError for an activation that is not known, or heads that do not divide `hidden_size`."""
    for name in ("hidden_act", "pooler_act"):
        if (value := getattr(config, name)) not in ACTIVATIONS:
            raise ValueError(f"{name}={value!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(f"hidden_size={config.hidden_size} is no multiple of {config.num_attention_heads=}")


@struct.dataclass
class Encoding:
    """What an encoder with a pooler returns.

    **Fields:**

    - `last_hidden_state`: `(batch, seq, d)`.
    - `pooler_output`: `(batch, d)`, of the first place.
    """

    last_hidden_state: Array
    pooler_output: Array


class Embeddings(nn.Module):
    """`norm(word[input_ids] + position[position_ids] + token_type[token_type_ids])`."""

    config: EncoderConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, input_ids: Array, token_type_ids: Array | None, position_ids: Array) -> Array:
        """Three integer arrays (batch or 1, seq) -> (batch, seq, d)."""
        config, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        embed = partial(nn.Embed, features=config.hidden_size, **dtypes)
        x = embed(config.vocab_size, name="word")(input_ids)
        x += embed(config.max_position_embeddings, name="position")(position_ids)
        if config.type_vocab_size:
            types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            x += embed(config.type_vocab_size, name="token_type")(types)
        elif token_type_ids is not None:
            raise ValueError(f"tokens have no types in this {config.model_type} model: leave token_type_ids out")
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
        activation = ACTIVATIONS[config.hidden_act]
        mlp = MLP(config.intermediate_size, activation, gated=False, use_bias=True, name="mlp", **dtypes)
        x = norm(name="attention_norm")(x + attention(x, mask))
        return norm(name="mlp_norm")(x + mlp(x))


class Encoder(nn.Module):
    """BERT's encoder without dropout (https://arxiv.org/abs/1810.04805), and its like, which differ in the config.

    `add_pooling_layer` adds `pooler_act(pooler(x[:, 0]))`, which only bare models have. `scan` keeps the layers'
    parameters stacked on a leading axis and compiles one layer; `remat` is as `apply_layers` takes it. `dtype` is what
    is computed in (None: the parameters'), `param_dtype` what is stored.
    """

    config: EncoderConfig
    scan: bool = False
    remat: bool | str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    add_pooling_layer: bool = False

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
    ) -> Array | Encoding:
        """The last hidden state (batch, seq, d) of integer arrays (batch, seq), or an `Encoding` of it.

        `attention_mask` is 1 at tokens and 0 at padding, on either side (left out: no padding); `token_type_ids`
        default to 0, `position_ids` to those that the config tells. Raises a ValueError for a sequence longer than
        there are positions, and for token types in a model without.
        """
        config, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        length, limit = input_ids.shape[-1], config.max_length
        if length > limit:
            raise ValueError(f"the sequence has {length} tokens, the most that have positions is {limit}: truncate it")
        if position_ids is None:
            position_ids = _positions(input_ids, config.padding_idx)
        mask = None if attention_mask is None else jnp.asarray(attention_mask, bool)[:, None, None, :]
        x = Embeddings(config, name="embeddings", **dtypes)(input_ids, token_type_ids, position_ids)
        layer = partial(EncoderLayer, config=config, **dtypes)
        x = apply_layers(layer, config.num_hidden_layers, x, mask, scan=self.scan, remat=self.remat)
        if not self.add_pooling_layer:
            return x
        pooler = nn.Dense(config.hidden_size, name="pooler", **dtypes)
        return Encoding(x, ACTIVATIONS[config.pooler_act](pooler(x[:, 0])))


def _positions(input_ids: Array, padding_idx: int | None) -> Array:
    if padding_idx is None:
        return jnp.arange(input_ids.shape[-1])[None]
    token = (input_ids != padding_idx).astype(jnp.int32)
    return jnp.cumsum(token, axis=1) * token + padding_idx
