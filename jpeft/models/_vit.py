"""The vision transformer."""

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ._encoder import Encoding, check_sizes
from ._layers import ACTIVATIONS, MLP, Attention, Norm, apply_layers


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """The numbers that make a ViT, under the names and with the defaults of Hugging Face's `ViTConfig`.

    Sizes are (height, width). Raises a ValueError for an activation that is not known, heads that do not divide
    `hidden_size`, or patches that do not divide the image.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (16, 16)
    num_channels: int = 3
    qkv_bias: bool = True
    pooler_output_size: int | None = None  # hidden_size
    pooler_act: str = "tanh"
    model_type: str = "vit"

    def __post_init__(self) -> None:
        check_sizes(self)
        if any(image % patch for image, patch in zip(self.image_size, self.patch_size, strict=True)):
            raise ValueError(f"image_size={self.image_size} is no multiple of patch_size={self.patch_size}")


class ViTLayer(nn.Module):
    """`x += attention(attention_norm(x))`, then `x += mlp(mlp_norm(x))`: the norms come first."""

    config: ViTConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x (batch, 1 + patches, d) -> the same shape."""
        config, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(Norm, config.layer_norm_eps, centered=True, param_dtype=self.param_dtype)
        heads = config.num_attention_heads
        attention = Attention(heads, heads, use_bias=config.qkv_bias, out_bias=True, name="attention", **dtypes)
        activation = ACTIVATIONS[config.hidden_act]
        mlp = MLP(config.intermediate_size, activation, gated=False, use_bias=True, name="mlp", **dtypes)
        x += attention(norm(name="attention_norm")(x))
        return x + mlp(norm(name="mlp_norm")(x))


class ViT(nn.Module):
    """A transformer over the patches of an image, and a token before them for their class.

    With `num_labels` it classifies images; without it returns the last hidden state, and with `add_pooling_layer` an
    `Encoding`, as `Encoder` does. `scan`, `remat`, `dtype` and `param_dtype` are those of `Encoder`, `labels` and
    `problem_type` those of `Classifier`. Source: https://arxiv.org/abs/2010.11929.
    """

    config: ViTConfig
    num_labels: int | None = None
    scan: bool = False
    remat: bool | str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    add_pooling_layer: bool = False
    labels: tuple[str, ...] = ()
    problem_type: str | None = None

    @nn.compact
    def __call__(self, pixel_values: Array) -> Array | Encoding:
        """pixel_values (batch, channels, height, width) -> float32 logits (batch, num_labels), or hidden states.

        Raises a ValueError for images of another size than the config's: positions are not interpolated.
        """
        config, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        d, expected = config.hidden_size, (config.num_channels, *config.image_size)
        if pixel_values.shape[1:] != expected:
            raise ValueError(
                f"pixel_values has shape {pixel_values.shape}, expected {('batch', *expected)}: (batch, channels, "
                "height, width). Positions are not interpolated: resize the images, as the model's processor does."
            )
        # A convolution's patches are (batch, rows, columns, d). Its input has one type with its kernel.
        patch = nn.Conv(d, config.patch_size, config.patch_size, padding="VALID", name="patch", **dtypes)
        x = patch(jnp.moveaxis(pixel_values, 1, 3).astype(self.dtype or self.param_dtype))
        x = x.reshape(x.shape[0], -1, d)

        def learned(name: str, count: int) -> Array:
            value = self.param(name, nn.initializers.normal(0.02), (1, count, d), self.param_dtype)
            return jnp.broadcast_to(value.astype(x.dtype), (x.shape[0], count, d))

        x = jnp.concatenate([learned("class_token", 1), x], axis=1)
        x += learned("position", x.shape[1])
        layer = partial(ViTLayer, config=config, **dtypes)
        x = apply_layers(layer, config.num_hidden_layers, x, scan=self.scan, remat=self.remat)
        x = Norm(config.layer_norm_eps, centered=True, param_dtype=self.param_dtype, name="norm")(x)
        if self.num_labels is not None:
            return nn.Dense(self.num_labels, dtype=jnp.float32, param_dtype=self.param_dtype, name="head")(x[:, 0])
        if not self.add_pooling_layer:
            return x
        pooler = nn.Dense(config.pooler_output_size or d, name="pooler", **dtypes)
        return Encoding(x, ACTIVATIONS[config.pooler_act](pooler(x[:, 0])))
