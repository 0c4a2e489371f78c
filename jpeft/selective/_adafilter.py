"""AdaFilter: every example takes each channel of a block from the pretrained block or from its fine-tuned copy."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ._spottune import along, mixed, pooled, straight_through


State = Any  # of a recurrent gate


def adafilter(
    block: Callable[[Any, jax.Array], jax.Array],
    frozen: Any,
    tuned: Any,
    x: jax.Array,
    gate: Callable[[State, jax.Array], tuple[State, jax.Array]],
    state: State,
    *,
    scan: bool = False,
) -> jax.Array:
    r"""$x_{t+1} = (1 - g_t) \odot F_t(x_t) + g_t \odot \hat F_t(x_t)$, with a $g_t \in \{0, 1\}^{channels}$ an example.

    One recurrent gate serves all blocks. From its state and the means of $x_t$ over space it makes logits $l_t$;
    $g_t = 1$ where $l_t > 0$, with the gradient of $\sigma(l_t)$.

    Guo et al., [AdaFilter](https://arxiv.org/abs/1911.09659), AAAI 2020.

    **Arguments:**

    - `block`, `frozen`, `tuned`, `scan`: as for `spottune`.
    - `x`: `(batch, ..., features)`, what the first block is called with.
    - `gate`: a function `(state, means (batch, features)) -> (state, logits (batch, channels))`, such as an
      `AdaFilterGate` is.
    - `state`: what the gate starts from, such as its `start(batch)`.

    **Raises** `ValueError` where `frozen` and `tuned` are of different numbers of blocks.
    """

    def step(carry, frozen, tuned):
        x, state = carry
        state, logits = gate(state, pooled(x))
        return mixed(block, frozen, tuned, x, straight_through(logits > 0, jax.nn.sigmoid(logits))), state

    return along(step, (x, state), (frozen, tuned), scan)[0]


class AdaFilterGate(nn.Module):
    """The gate of `adafilter`: an LSTM cell, and a dense layer to the channels."""

    channels: int
    width: int = 64

    @nn.compact
    def __call__(self, state: State, x: jax.Array) -> tuple[State, jax.Array]:
        """x (batch, features) -> the next state, and logits (batch, channels)."""
        state, hidden = nn.LSTMCell(self.width, name="cell")(state, x)
        return state, nn.Dense(self.channels, name="logits")(hidden)

    def start(self, batch: int) -> State:
        """The state before the first block: zeros."""
        return jnp.zeros((batch, self.width)), jnp.zeros((batch, self.width))
