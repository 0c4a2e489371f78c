"""Which token comes next: scores of the vocabulary in, tokens out.

The scores are float32 `(batch, vocab)`. What a filter rules out becomes minus infinity. Each function does what the
processor of that name does in transformers, `generation/logits_process.py`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Sampling(NamedTuple):
    """How to choose. `None` leaves a step out; numbers are traced, so that another value is not another compilation."""

    temperature: Array | float | None = None  # None: the highest score
    top_k: Array | int | None = None
    top_p: Array | float | None = None
    min_p: Array | float | None = None
    repetition_penalty: Array | float | None = None


def choose(scores: Array, seen: Array | None, sampling: Sampling, key: Array) -> Array:
    """The next token of every row, `(batch,)`, by scores as `process` makes them.

    `seen`, bool `(batch, vocab)`, is of the tokens that a row has already; it may be `None` without a penalty.
    """
    scores = process(scores, seen, sampling)
    if sampling.temperature is None:
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, scores).astype(jnp.int32)


def process(scores: Array, seen: Array | None, sampling: Sampling) -> Array:
    """The scores that tokens are chosen by: the steps that are not `None`, in transformers' order.

    Without a temperature the filters are left out: none of them rules the highest score out.
    """
    if sampling.repetition_penalty is not None:
        scores = repetition_penalty(scores, seen, sampling.repetition_penalty)
    if sampling.temperature is None:
        return scores
    scores = scores / sampling.temperature
    for step, limit in ((top_k, sampling.top_k), (top_p, sampling.top_p), (min_p, sampling.min_p)):
        if limit is not None:
            scores = step(scores, limit)
    return scores


def repetition_penalty(scores: Array, seen: Array, penalty: Array | float) -> Array:
    """Divides the positive scores of the tokens in `seen` by `penalty` and multiplies the negative ones.

    Source: https://arxiv.org/abs/1909.05858.
    """
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def top_k(scores: Array, k: Array | int) -> Array:
    """Keeps the `k` highest scores, and those equal to the lowest of them. Source: https://arxiv.org/abs/1805.04833."""
    ascending = jnp.sort(scores, axis=-1)
    lowest = jnp.take(ascending, jnp.maximum(scores.shape[-1] - k, 0), axis=-1)
    return _keep(scores, scores >= lowest[:, None])


def top_p(scores: Array, p: Array | float) -> Array:
    """Keeps the fewest tokens, the most probable first, whose probabilities add up to `p` or more.

    Source: https://arxiv.org/abs/1904.09751.
    """
    order = jnp.argsort(scores, axis=-1)
    up_to = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(scores, order, axis=-1)), axis=-1)
    kept = (up_to > 1 - p).at[:, -1].set(True)
    return _keep(scores, jnp.put_along_axis(kept, order, kept, axis=-1, inplace=False))


def min_p(scores: Array, p: Array | float) -> Array:
    """Keeps the tokens whose probability is at least `p` of the highest. Source: https://arxiv.org/abs/2407.01082."""
    probabilities = jax.nn.softmax(scores)
    return _keep(scores, probabilities >= p * jnp.max(probabilities, axis=-1, keepdims=True))


def _keep(scores: Array, kept: Array) -> Array:
    return jnp.where(kept, scores, -jnp.inf)
