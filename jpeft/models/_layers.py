"""What the reference encoder and decoder share: attention, the feed-forward block, and the loop over layers."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array


class Norm(nn.Module):
    """`x / sqrt(mean(x^2) + epsilon) * scale`: RMSNorm. With `centered`, of `x - mean(x)` and with a bias: LayerNorm.

    In float32 for any type of input and parameters, with the variance in two passes: Flax's norms refuse mixed types
    under strict promotion, and their one-pass variance loses too many digits for BERT's epsilon of 1e-12.
    Source: https://arxiv.org/abs/1910.07467, https://arxiv.org/abs/1607.06450.
    """

    epsilon: float
    centered: bool
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x (..., d) -> (..., d), in the type of x."""

        def parameter(name: str, init: nn.initializers.Initializer) -> Array:
            value = self.param(name, init, x.shape[-1:], self.param_dtype)
            return jnp.expand_dims(value.astype(jnp.float32), range(x.ndim - 1))

        y = x.astype(jnp.float32)
        if self.centered:
            y -= jnp.mean(y, axis=-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        y *= parameter("scale", nn.initializers.ones)
        if self.centered:
            y += parameter("bias", nn.initializers.zeros)
        return y.astype(x.dtype)


class Attention(nn.Module):
    """`out(attend(query(x), key(x), value(x)))`, the query and key rotated when there are angles."""

    heads: int
    key_value_heads: int
    use_bias: bool
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array | None, angles: Array | None = None) -> Array:
        """x (batch, seq, d); mask bool, broadcasts to (batch, heads, seq, seq); angles as `rotate` takes them."""
        dense = partial(nn.Dense, use_bias=self.use_bias, dtype=self.dtype, param_dtype=self.param_dtype)
        width = x.shape[-1] // self.heads

        def heads(count: int, name: str) -> Array:
            return dense(count * width, name=name)(x).reshape(*x.shape[:-1], count, width)

        query = heads(self.heads, "query")
        key = heads(self.key_value_heads, "key")
        value = heads(self.key_value_heads, "value")
        if angles is not None:
            query, key = rotate(query, angles), rotate(key, angles)
        y = attend(query, key, value, mask)
        return dense(x.shape[-1], name="out")(y.reshape(x.shape))


class MLP(nn.Module):
    """`down(activation(up(x)))`, or `down(activation(gate(x)) * up(x))` when gated.

    Source: https://arxiv.org/abs/2002.05202.
    """

    width: int
    activation: Callable[[Array], Array]
    gated: bool
    use_bias: bool
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x (batch, seq, d) -> (batch, seq, d)."""
        dense = partial(nn.Dense, use_bias=self.use_bias, dtype=self.dtype, param_dtype=self.param_dtype)
        up = dense(self.width, name="up")(x)
        hidden = self.activation(dense(self.width, name="gate")(x)) * up if self.gated else self.activation(up)
        return dense(x.shape[-1], name="down")(hidden)


def attend(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    """`softmax(query key^T / sqrt(width)) value`, the softmax in float32.

    query (batch, seq, heads, width); key and value (batch, seq, groups, width), each for heads / groups heads; mask
    bool (batch or 1, 1, seq or 1, seq), True where a key is seen. `jax.nn.dot_product_attention` computes the same,
    but mixes bfloat16 with float32, which strict promotion refuses.
    Source: https://arxiv.org/abs/1706.03762, and https://arxiv.org/abs/2305.13245 for the groups.
    """
    batch, length, heads, width = query.shape
    groups = key.shape[2]
    query = query.reshape(batch, length, groups, heads // groups, width)
    logits = jnp.einsum("bqghw,bkgw->bghqk", query.astype(jnp.float32), key.astype(jnp.float32)) / math.sqrt(width)
    if mask is not None:
        # Not -inf: a row that sees nothing, as left padding does, would be NaN.
        logits = jnp.where(mask[:, :, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits).astype(value.dtype)
    return jnp.einsum("bghqk,bkgw->bqghw", weights, value).reshape(batch, length, heads, width)


def rotate(x: Array, angles: Array) -> Array:
    """Rotary position embedding: pairs entry i with entry i + width / 2 and turns each pair by its angle.

    x (batch, seq, heads, width), angles float32 (batch or 1, seq, 1, width / 2). The pairs are those of Hugging Face's
    Llama checkpoints. Source: https://arxiv.org/abs/2104.09864.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def apply_layers(layer: partial, count: int, x: Array, *args: Any, scan: bool, remat: bool) -> Array:
    """`x = layer(x, *args)`, `count` times, with parameters of its own each time; called inside a compact method.

    The parameters are `layers_0`, `layers_1`, ... or, with `scan`, one `layers` whose leading axis is the layer.
    `remat` keeps only each layer's input for the backward pass. `layer` is a `partial` that gives a
    module class its fields.
    """
    module, fields = layer.func, layer.keywords
    if remat:
        module = nn.remat(module, prevent_cse=not scan)  # a scan's body is never merged with its own recomputation
    if not scan:
        for i in range(count):
            x = module(**fields, name=f"layers_{i}")(x, *args)
        return x
    loop = nn.scan(
        lambda layer, x, *args: (layer(x, *args), None),
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},  # the model has no dropout; adapters inside it may
        in_axes=nn.broadcast,
        length=count,
    )
    return loop(module(**fields, name="layers"), x, *args)[0]


def stack_layers(params: dict) -> dict:
    """The parameters of an unrolled model as those of the scanned one: `layers_0`, `layers_1`, ... -> `layers`."""
    count = sum(name.startswith("layers_") for name in params)
    layers = [params[f"layers_{i}"] for i in range(count)]
    rest = {name: value for name, value in params.items() if not name.startswith("layers_")}
    return {**rest, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}
