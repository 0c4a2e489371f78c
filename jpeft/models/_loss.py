"""Cross-entropy over a large vocabulary, whose logits are never all in memory."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from .._mesh import batch_axes
from ._sharding import for_whole_batch


IGNORED = -100  # a label that is not to be predicted, as in PyTorch
LOGITS = 2**26  # in memory at a time, on a device: 256 MB in float32


def cross_entropy(logits: Array, labels: Array) -> Array:
    """`-log softmax(logits)[labels]` (...), 0 where ignored; logits float32 (..., vocab), labels integer (...)."""
    kept = labels != IGNORED
    chosen = jnp.take_along_axis(logits, jnp.where(kept, labels, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(kept, jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0)


def chunked_cross_entropy(
    head: nn.Module, logits: Callable[[nn.Module, Array], Array], x: Array, labels: Array, size: int
) -> Array:
    """`cross_entropy(logits(head, x), labels)`, a part of the sequence at a time; called inside a compact method.

    The backward pass forms the logits of a part again. The sequence is what is parted, so that a batch may be sharded.
    A head that is divided along axes which divide the batch, too, is gathered once, and not for every part.

    Args:
      head: the module whose parameters `logits` uses.
      logits: of `head` and x (batch, tokens, d): float32 (batch, tokens, vocab).
      x: (batch, seq, d).
      labels: (batch, seq), -100 where ignored.
      size: of the vocabulary.
    """
    batch, length = labels.shape
    if length == 0:
        return jnp.zeros((batch, 0), jnp.float32)
    _, divided = batch_axes(batch)
    parts = -(-length // tokens_at_a_time(batch // divided, size))
    width = -(-length // parts)
    padding = [(0, 0), (0, parts * width - length)]
    x = jnp.pad(x, [*padding, (0, 0)])
    labels = jnp.pad(labels, padding, constant_values=IGNORED)
    part = lambda array: array.reshape(batch, parts, width, *array.shape[2:]).swapaxes(0, 1)

    def losses(head: nn.Module, carry: None, x: Array, labels: Array) -> tuple[None, Array]:
        return carry, cross_entropy(logits(head, x), labels)

    loop = nn.scan(
        nn.remat(losses, prevent_cse=False),
        variable_broadcast="params",
        split_rngs={"params": False, "dropout": True},
        in_axes=0,
    )
    if divided > 1 and not head.is_initializing():
        loop = nn.map_variables(loop, "params", trans_in_fn=lambda tree: for_whole_batch(tree, head.path))
    y = loop(head, None, part(x), part(labels))[1]
    return y.swapaxes(0, 1).reshape(batch, parts * width)[:, :length]


def tokens_at_a_time(rows: int, size: int) -> int:
    """Of how many tokens of each of `rows`, those on a device, the logits are formed at once, `size` for each."""
    return max(1, LOGITS // (rows * size))


def next_token_losses(
    head: nn.Module,
    logits: Callable[[nn.Module, Array], Array],
    x: Array,
    labels: Array,
    segment_ids: Array | None,
    size: int,
) -> Array:
    """At t the cross-entropy of predicting `labels[:, t]` from `x[:, t - 1]`: 0 at a segment's first token.

    The arguments are those of `chunked_cross_entropy`; segment_ids (batch, seq).
    """
    before = lambda array, value: jnp.pad(array, [(0, 0), (1, 0)], constant_values=value)
    if segment_ids is not None:
        labels = jnp.where(before(segment_ids[:, 1:] != segment_ids[:, :-1], False), IGNORED, labels)
    return before(chunked_cross_entropy(head, logits, x[:, :-1], labels[:, 1:], size), 0)
