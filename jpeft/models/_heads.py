"""What reads an encoder: logits of a text or of its tokens, and embeddings."""

from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ._encoder import Encoder, EncoderConfig
from ._layers import ACTIVATIONS


class Classifier(nn.Module):
    """Logits of an encoding: `head(pool(encoder(input_ids)))`. With one label it is a regression.

    `pooling="mean"` averages the tokens that `attention_mask` keeps, as sentence-transformers does; `"cls"` is that of
    transformers' classifiers, `pooler_act(pooler(x[:, 0]))`; `None` leaves every token its own logits. Raises a
    ValueError for another.

    `labels` and `problem_type` are what a `config.json` says of the labels, their names and the loss; nothing here
    depends on them.
    """

    config: EncoderConfig
    num_labels: int
    pooling: Literal["mean", "cls"] | None = "mean"
    scan: bool = False
    remat: bool | str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    labels: tuple[str, ...] = ()
    problem_type: str | None = None

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
    ) -> Array:
        """The arguments of `Encoder` -> float32 logits (batch, num_labels), or (batch, seq, num_labels)."""
        if self.pooling not in ("mean", "cls", None):
            raise ValueError(f"pooling={self.pooling!r} is not supported; supported: 'mean', 'cls', None")
        encoder = Encoder(self.config, self.scan, self.remat, self.dtype, self.param_dtype, name="encoder")
        x = encoder(input_ids, attention_mask, token_type_ids, position_ids)
        dense = partial(nn.Dense, param_dtype=self.param_dtype)
        if self.pooling == "mean":
            x = mean(x, attention_mask)
        elif self.pooling == "cls":
            pooler = dense(self.config.hidden_size, dtype=self.dtype, name="pooler")
            x = ACTIVATIONS[self.config.pooler_act](pooler(x[:, 0]))
        return dense(self.num_labels, dtype=jnp.float32, name="head")(x)


class Embedder(nn.Module):
    """Embeddings of texts: the mean of the tokens that `attention_mask` keeps, or the first (`pooling="cls"`).

    `normalize` makes them of length 1. Both as in sentence-transformers (https://arxiv.org/abs/1908.10084). Raises a
    ValueError for another pooling.
    """

    config: EncoderConfig
    pooling: Literal["mean", "cls"] = "mean"
    normalize: bool = False
    scan: bool = False
    remat: bool | str | None = None
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
        """The arguments of `Encoder` -> float32 (batch, d)."""
        if self.pooling not in ("mean", "cls"):
            raise ValueError(f"pooling={self.pooling!r} is not supported; supported: 'mean', 'cls'")
        encoder = Encoder(self.config, self.scan, self.remat, self.dtype, self.param_dtype, name="encoder")
        x = encoder(input_ids, attention_mask, token_type_ids, position_ids)
        x = mean(x, attention_mask) if self.pooling == "mean" else x[:, 0].astype(jnp.float32)
        if self.normalize:
            x *= jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))
        return x


def mean(x: Array, attention_mask: Array | None) -> Array:
    """Over the places that are kept: x (batch, seq, d) -> float32 (batch, d)."""
    kept = jnp.ones(x.shape[:2]) if attention_mask is None else jnp.asarray(attention_mask, bool).astype(jnp.float32)
    total = jnp.sum(kept[:, :, None] * x.astype(jnp.float32), axis=1)
    # A row of padding alone has no mean: zero, as a NaN would spoil the whole batch's loss.
    return total / jnp.maximum(jnp.sum(kept, axis=1, keepdims=True), 1.0)
