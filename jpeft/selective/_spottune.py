"""SpotTune: every example goes, block by block, through a pretrained block or through its fine-tuned copy."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def spottune(
    block: Callable[[Any, jax.Array], jax.Array],
    frozen: Any,
    tuned: Any,
    x: jax.Array,
    logits: jax.Array,
    *,
    key: jax.Array | None = None,
    temperature: float = 5.0,
    scan: bool = False,
) -> jax.Array:
    r"""$x_{t+1} = (1 - a_t)\,F_t(x_t) + a_t\,\hat F_t(x_t)$, where each example has an $a_t \in \{0, 1\}$ of its own.

    $a = 1$ where $l_1 + g_1 > l_0 + g_0$, with $g$ Gumbel noise if there is a `key`, and zero if there is none. Its
    gradient is that of $\mathrm{softmax}((l + g) / \tau)_1$.

    Guo et al., [SpotTune](https://arxiv.org/abs/1811.08737), CVPR 2019.

    **Arguments:**

    - `block`: $F$, a function `(params, x) -> y`.
    - `frozen`, `tuned`: the parameters of every block, pretrained ones and those that train: two sequences, or, with
      `scan`, two trees whose arrays have the block as their first axis.
    - `x`: `(batch, ...)`, what the first block is called with.
    - `logits`: $l$ `(batch, blocks, 2)`, such as a `SpotTunePolicy` gives.
    - `key`: for training. Leave it out in evaluation, which so is no game of chance.
    - `temperature`: $\tau$.
    - `scan`: whether the blocks are stacked; they are compiled once.

    **Raises** `ValueError` for logits of another shape, and where `frozen`, `tuned` and `logits` are of different
    numbers of blocks.
    """
    if logits.shape[2:] != (2,):
        raise ValueError(f"`logits` has the shape {logits.shape}: it should be (batch, blocks, 2).")
    if key is not None:
        logits = logits + jax.random.gumbel(key, logits.shape, logits.dtype)
    soft = jax.nn.softmax(logits / temperature)[..., 1]
    gates = straight_through(logits[..., 1] > logits[..., 0], soft)

    def step(x, frozen, tuned, gate):
        return mixed(block, frozen, tuned, x, gate)

    return along(step, x, (frozen, tuned, jnp.moveaxis(gates, 1, 0)), scan)


class SpotTunePolicy(nn.Module):
    """The logits `(batch, blocks, 2)` of `spottune`, of an input `(batch, ..., features)`: a small network.

    The axes between the first and the last are averaged, and two dense layers follow.
    """

    blocks: int
    width: int = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x (batch, ..., features) -> (batch, blocks, 2)."""
        hidden = nn.relu(nn.Dense(self.width, name="up")(pooled(x)))
        return nn.Dense(2 * self.blocks, name="down")(hidden).reshape(-1, self.blocks, 2)


def straight_through(hard: jax.Array, soft: jax.Array) -> jax.Array:
    """`hard`, with the gradient of `soft`."""
    return hard.astype(soft.dtype) + (soft - jax.lax.stop_gradient(soft))


def mixed(block: Callable, frozen: Any, tuned: Any, x: jax.Array, gate: jax.Array) -> jax.Array:
    """The frozen block's output where `gate` is 0, the tuned one's where it is 1: `(batch,)` or `(batch, channels)`."""
    y, other = block(frozen, x), block(tuned, x)
    gate = gate.astype(y.dtype).reshape(gate.shape[0], *(1,) * (y.ndim - gate.ndim), *gate.shape[1:])
    return (1 - gate) * y + gate * other  # exact at both ends, unlike y + gate * (other - y)


def along(step: Callable, state: Any, blocks: Sequence[Any], scan: bool) -> Any:
    """`state = step(state, *block)` for every block; `blocks` are sequences, or trees stacked over the blocks."""
    counts = [jax.tree.leaves(tree)[0].shape[0] if scan else len(tree) for tree in blocks]
    if len(set(counts)) > 1:
        names = dict(zip(("frozen", "tuned", "logits"), counts, strict=False))
        raise ValueError(f"Every block comes frozen and tuned, but these are not of as many blocks: {names}.")
    if scan:
        return jax.lax.scan(lambda state, block: (step(state, *block), None), state, tuple(blocks))[0]
    return functools.reduce(lambda state, block: step(state, *block), zip(*blocks, strict=True), state)


def pooled(x: jax.Array) -> jax.Array:
    """`(batch, ..., features)` -> `(batch, features)` in float32: means over the axes between."""
    return jnp.mean(x.astype(jnp.float32), axis=range(1, x.ndim - 1))
