"""A mixture of experts: each token goes through the few feed-forward blocks that a router picks."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array


class Experts(nn.Module):
    """`down[e](activation(gate[e](x)) * up[e](x))` of rows that are sorted by their expert e.

    Parameters `gate_up` (experts, d, 2 width), gate and up in this order, and `down` (experts, width, d).
    """

    count: int
    width: int
    activation: Callable[[Array], Array]
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, sizes: Array) -> Array:
        """x (rows, d), sizes (experts,): how many rows each expert has -> (rows, d)."""
        init = nn.initializers.lecun_normal(in_axis=1, out_axis=2, batch_axis=0)
        gate_up = self.param("gate_up", init, (self.count, x.shape[-1], 2 * self.width), self.param_dtype)
        down = self.param("down", init, (self.count, self.width, x.shape[-1]), self.param_dtype)
        x, gate_up, down = nn.dtypes.promote_dtype(x, gate_up, down, dtype=self.dtype)
        gate, up = jnp.split(jax.lax.ragged_dot(x, gate_up, sizes), 2, axis=-1)
        return jax.lax.ragged_dot(self.activation(gate) * up, down, sizes)


class MixtureOfExperts(nn.Module):
    """`sum over the best e of p[e] experts[e](x)`, p the softmax of the router's scores in float32.

    `best` of the `count` experts are used for a token; their p are made to sum to 1 where `normalize`.
    Source: https://arxiv.org/abs/2401.04088; without dropping of tokens, as https://arxiv.org/abs/2211.15841.
    """

    count: int
    best: int
    width: int
    activation: Callable[[Array], Array]
    normalize: bool
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x (batch, seq, d) -> (batch, seq, d)."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        rows = x.reshape(-1, x.shape[-1])
        scores = nn.Dense(self.count, use_bias=False, name="router", **dtypes)(rows)
        weights, chosen = jax.lax.top_k(jax.nn.softmax(scores.astype(jnp.float32)), self.best)  # (tokens, best)
        if self.normalize:
            weights /= jnp.sum(weights, axis=-1, keepdims=True)
        order = jnp.argsort(chosen.reshape(-1))  # of (token, choice), by expert
        sizes = jnp.bincount(chosen.reshape(-1), length=self.count)
        experts = Experts(self.count, self.width, self.activation, name="experts", **dtypes)
        y = experts(rows[order // self.best], sizes)
        y = y[jnp.argsort(order)].reshape(*chosen.shape, -1)
        return jnp.sum(y * weights[:, :, None].astype(y.dtype), axis=1).reshape(x.shape)
