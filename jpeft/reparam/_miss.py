"""MiSS: one small matrix, repeated."""

import jax
import jax.numpy as jnp

from .._node import Branch, Static, Trainable
from .._operands import dropout as drop
from .._targets import Option, Sites, Targets
from .._tree import Params, transform, wrap


class MiSS(Branch):
    r"""$W' = W + [D; D; \dots]$: $D$, repeated down the inputs and cut off at their end.

    On activations, the sum of the input's pieces times $D$: LoRA with $A = [I; I; \dots]$. Where $D$ is narrower than
    the outputs, it is repeated along them, too, `repeats` times.

    Kang and Yin, [MiSS: Balancing LoRA Performance and Efficiency with Simple Shard
    Sharing](https://arxiv.org/abs/2409.15371), 2024. First called Bone.
    """

    d: Trainable[jax.Array, "rank width"]
    repeats: Static[int] = 1
    dropout: Static[float] = 0.0

    def weight(self, w):
        pieces = -(-w.shape[0] // len(self.d))
        return w + jnp.tile(self.d, (pieces, self.repeats))[: w.shape[0]]

    def branch(self, x, key):
        rank = len(self.d)
        x = drop(x, self.dropout, key)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % rank)])
        y = x.reshape(*x.shape[:-1], -1, rank).sum(axis=-2) @ self.d
        return jnp.tile(y, self.repeats)


@transform
def miss(
    params: Params,
    *,
    rank: Option = 64,
    width: Option = None,
    dropout: Option = 0.0,
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Add one small trainable matrix, repeated, to every targeted kernel. See `MiSS`.

    **Arguments:**

    - `rank`: the rows of $D$; a number, or a mapping from patterns to numbers, as are `width` and `dropout`.
    - `width`: the columns of $D$, which divide the outputs; all outputs if left out.
    - `dropout`: the rate at which inputs of the term are dropped, where `apply` is given a `"dropout"` key.
    - `targets`, `sites`: which kernels. By default every one but the output head.
    - `key`: not used: $D$ starts at zero.

    **Raises** `ValueError` for a rank below one or above the inputs, a width that does not divide the outputs, a
    dropout outside `[0, 1)`, and for targets as `wrap` does.
    """

    def new(key, w, *, rank, width, dropout):
        wide = w.shape[1] if width is None else width
        if not 1 <= rank <= w.shape[0] or wide < 1 or w.shape[1] % wide or not 0 <= dropout < 1:
            raise ValueError(
                f"MiSS of a kernel {w.shape} needs a rank from 1 to {w.shape[0]}, a width that divides {w.shape[1]}, "
                f"and a dropout in [0, 1), not {rank=}, {width=} and {dropout=}."
            )
        return MiSS(d=jnp.zeros((rank, wide)), repeats=w.shape[1] // wide, dropout=dropout)

    return wrap(params, new, targets=targets, sites=sites, key=key, rank=rank, width=width, dropout=dropout)
