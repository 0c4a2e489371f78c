"""What the reference models share: norms, the feed-forward block, and the loop over layers."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ._attention import Attention as Attention
from ._sharding import along_batch


# By the names of Hugging Face's configs.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}

# What the backward pass finds, of what the forward pass computed.
POLICIES = {
    "full": None,  # the layers' inputs alone
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # not the scores of attention
}


class Norm(nn.Module):
    """`x / sqrt(mean(x^2) + epsilon) * (offset + scale)`: RMSNorm. With `centered`, of `x - mean(x)` and with a bias:
    LayerNorm.

    In float32 for any type of input and parameters, with the variance in two passes: Flax's norms refuse mixed types
    under strict promotion, and their one-pass variance loses too many digits for BERT's epsilon of 1e-12.
    Source: https://arxiv.org/abs/1910.07467, https://arxiv.org/abs/1607.06450.
    """

    epsilon: float
    centered: bool
    offset: float = 0.0
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x (..., d) -> (..., d), in the type of x."""

        def parameter(name: str, start: float) -> Array:
            value = self.param(name, nn.initializers.constant(start), x.shape[-1:], self.param_dtype)
            return jnp.expand_dims(value.astype(jnp.float32), range(x.ndim - 1))

        y = x.astype(jnp.float32)
        if self.centered:
            y -= jnp.mean(y, axis=-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        y *= self.offset + parameter("scale", 1.0 - self.offset)
        if self.centered:
            y += parameter("bias", 0.0)
        return y.astype(x.dtype)


class MLP(nn.Module):
    """`down(activation(up(x)))`, or `down(activation(gate(x)) * up(x))` when gated.

    `fused`: gate and up are one matrix `gate_up`, in this order. Source: https://arxiv.org/abs/2002.05202.
    """

    width: int
    activation: Callable[[Array], Array]
    gated: bool
    use_bias: bool
    fused: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x (batch, seq, d) -> (batch, seq, d)."""
        dense = partial(nn.Dense, use_bias=self.use_bias, dtype=self.dtype, param_dtype=self.param_dtype)
        if not self.gated:
            hidden = self.activation(dense(self.width, name="up")(x))
        elif self.fused:
            gate, up = jnp.split(dense(2 * self.width, name="gate_up")(x), 2, axis=-1)
            hidden = self.activation(gate) * up
        else:
            hidden = self.activation(dense(self.width, name="gate")(x)) * dense(self.width, name="up")(x)
        return dense(x.shape[-1], name="down")(hidden)


def apply_layers(
    layer: partial,
    count: int,
    x: Array,
    *args: Any,
    each: Sequence[Any] = (),
    cache: Any = None,
    scan: bool = False,
    remat: bool | str | None = None,
) -> Any:
    """`x = layer(x, *args)`, `count` times, with parameters of its own each time; called inside a compact method.

    The parameters are `layers_0`, `layers_1`, ... or, with `scan`, one `layers` whose leading axis is the layer.

    Args:
      layer: a `partial` that gives a module class its fields.
      args: what every layer is called with.
      each: arrays with one entry a layer, which the layers are called with after `args`.
      cache: if there is one, `x, cache = layer(x, *args, cache=cache)`, and both are returned.
      remat: what the backward pass does not recompute: "full" (or True) keeps each layer's input alone, "dots" the
        products too, "dots_no_batch" those with weights; None recomputes nothing.

    Raises a ValueError for another `remat`.
    """
    module, fields = layer.func, layer.keywords
    if remat:
        name = "full" if remat is True else remat
        if name not in POLICIES:
            raise ValueError(f"remat={remat!r} is not supported; supported: None, {', '.join(map(repr, POLICIES))}")
        # A scan's body is never merged with its own recomputation.
        module = nn.remat(module, policy=POLICIES[name], prevent_cse=not scan)

    def step(layer: nn.Module, state: tuple, args: tuple, each: tuple) -> tuple[tuple, None]:
        x, cache = state
        x = along_batch(x)
        if cache is None:
            return (layer(x, *args, *each), None), None
        return layer(x, *args, *each, cache=cache), None

    if scan:
        step = nn.scan(
            step,
            variable_axes={"params": 0, "intermediates": 0},  # what layers sow comes out stacked
            split_rngs={"params": True, "dropout": True},  # the model has no dropout; adapters inside it may
            in_axes=(nn.broadcast, 0),
            length=count,
        )
        x, cache = step(module(**fields, name="layers"), (x, cache), args, tuple(each))[0]
    else:
        for i in range(count):
            now = tuple(array[i] for array in each)
            x, cache = step(module(**fields, name=f"layers_{i}"), (x, cache), args, now)[0]
    x = along_batch(x)
    return x if cache is None else (x, cache)


def stack_layers(params: dict) -> dict:
    """The parameters of an unrolled model as those of the scanned one: `layers_0`, `layers_1`, ... -> `layers`."""
    count = sum(name.startswith("layers_") for name in params)
    layers = [params[f"layers_{i}"] for i in range(count)]
    rest = {name: value for name, value in params.items() if not name.startswith("layers_")}
    return {**rest, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}
