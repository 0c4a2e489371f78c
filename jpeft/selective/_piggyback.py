"""Piggyback: kernels that are masked, entry by entry."""

import jax
import jax.numpy as jnp

from .._node import Frozen, Reparam, Static, Trainable
from .._targets import Option, Sites, Targets
from .._tree import Params, map_nodes, transform, wrap


class Piggyback(Reparam):
    r"""$W' = W \odot m$ with $m_{ij} = 1$ where $M_{ij} > \tau$, else 0; if ternary, $-1$ where $M_{ij} < \nu$.

    $M$ gets the gradient of $m$, as if $m$ were $M$: $\partial L / \partial M = W \odot \partial L / \partial W'$.

    Mallya et al., [Piggyback](https://arxiv.org/abs/1801.06519), ECCV 2018.
    """

    scores: Trainable[jax.Array, "in out"]  # M
    threshold: Static[float] = 5e-3
    negative: Static[float | None] = None

    @property
    def planes(self) -> jax.Array:
        """Where the mask is 1 and, if it is ternary, where it is -1: `(planes, in, out)`."""
        planes = [self.scores > self.threshold]
        return jnp.stack(planes if self.negative is None else [*planes, self.scores < self.negative])

    def weight(self, w):
        through = self.scores - jax.lax.stop_gradient(self.scores)  # zero, with the gradient of M
        return w * (_mask(self.planes, w.dtype) + through.astype(w.dtype))


class BitMask(Reparam):
    r"""$W' = W \odot m$ with the mask of a `Piggyback`, kept in one bit an entry, and in two if it is ternary."""

    bits: Frozen[jax.Array, "planes bytes"]  # uint8; the entries of the (in, out) matrix are counted row by row

    def weight(self, w):
        planes = jnp.unpackbits(self.bits, axis=-1, count=w.size).reshape(-1, *w.shape)
        return w * _mask(planes, w.dtype)


def _mask(planes: jax.Array, dtype: jnp.dtype) -> jax.Array:
    kept, *flipped = planes.astype(dtype)
    return kept - sum(flipped)


@transform
def piggyback(
    params: Params,
    *,
    threshold: Option = 5e-3,
    negative: Option = None,
    start: Option = 1e-2,
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Learn which entries of every targeted kernel to keep; none of them changes. See `Piggyback`.

    Give its optimizer no weight decay: it would pull all scores below the threshold, and every entry be masked.

    **Arguments:**

    - `threshold`: $\tau$; a number, or a mapping from patterns to numbers, as are the other two.
    - `negative`: $\nu$, for a ternary mask: entries whose score is below it change their sign. The authors' code has 0.
    - `start`: of every score. Above the threshold, so that the model starts as it was.
    - `targets`, `sites`: which kernels. By default every one but the output head.
    - `key`: not used.

    **Raises** `ValueError` unless `negative <= threshold < start`, and for targets as `wrap` does.
    """

    def new(key, w, *, threshold, negative, start):
        if not (threshold if negative is None else negative) <= threshold < start:
            raise ValueError(f"`negative <= threshold < start` must hold, not {negative=}, {threshold=}, {start=}.")
        return Piggyback(scores=jnp.full(w.shape, start, jnp.float32), threshold=threshold, negative=negative)

    given = {"threshold": threshold, "negative": negative, "start": start}
    return wrap(params, new, targets=targets, sites=sites, key=key, **given)


def harden(params: Params) -> Params:
    """The tree with a `BitMask` in place of every `Piggyback`: what is left to keep, and save, once it is trained.

    **Raises** `ValueError` if there is no `Piggyback` node in the tree.
    """
    pack = lambda node: jnp.packbits(node.planes.reshape(len(node.planes), -1), axis=-1)
    hard = lambda x: BitMask(base=x.base, axes=x.axes, bits=x.replace(base=None).each(pack))
    return map_nodes(hard, params, Piggyback, "piggyback")
