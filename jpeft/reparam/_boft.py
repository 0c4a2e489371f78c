"""BOFT: orthogonal fine-tuning by butterflies."""

import jax
import jax.numpy as jnp

from .._node import Reparam, Trainable
from .._targets import Option, Sites, Targets
from .._tree import Params, transform, wrap
from ._oft import cayley


class BOFT(Reparam):
    r"""$W' = (B_m \cdots B_1 W)\,\mathrm{diag}(s)$, $B_i = P_i\,\mathrm{diag}(R_{i1}, \dots, R_{in})\,P_i^\top$.

    $R_{ij} = (I - S)(I + S)^{-1}$ with the skew part $S$ of $Z_{ij}$, and $P_i$ brings inputs together that are
    $2^{i-1}$ half blocks apart: $m$ factors mix blocks of $2^{m-1}$ times the size. $s$ scales the outputs, but for the
    bias.

    Liu et al., [Parameter-Efficient Orthogonal Finetuning via Butterfly
    Factorization](https://arxiv.org/abs/2311.06243), ICLR 2024.
    """

    z: Trainable[jax.Array, "factors blocks block block"]
    scale: Trainable[jax.Array, "out"]

    def weight(self, w):
        rotations = cayley((self.z - self.z.mT) / 2)
        for n, rotation in enumerate(rotations):
            w = _apart(rotation @ _together(w, n, rotation.shape[-1]), n, w.shape)
        return w * self.scale[None]


def _together(w: jax.Array, n: int, block: int) -> jax.Array:
    r"""$P^\top W$ as `(blocks, block, out)`: of $2^{n+1}$ half blocks the first of each pair, and then the second."""
    if n:  # with one factor a block may be odd
        w = w.reshape(-1, 2, 2**n, block // 2, w.shape[1]).swapaxes(1, 2)
    return w.reshape(-1, block, w.shape[-1])


def _apart(w: jax.Array, n: int, shape: tuple[int, int]) -> jax.Array:
    """Undo `_together`."""
    if n:
        w = w.reshape(-1, 2**n, 2, w.shape[1] // 2, shape[1]).swapaxes(1, 2)
    return w.reshape(shape)


@transform
def boft(
    params: Params,
    *,
    block: Option = 4,
    factors: Option = 1,
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Rotate the inputs of every targeted kernel by butterflies, and scale its outputs. See `BOFT`.

    **Arguments:**

    - `block`: how many inputs a block has; a number, or a mapping from patterns to numbers, as is `factors`.
    - `factors`: $m$. `block * 2**(factors - 1)` divides the inputs; with more than one, blocks are even, and so is
      their number.
    - `targets`, `sites`: which kernels. By default every one but the output head.
    - `key`: not used: $Z$ starts at zero and $s$ at one.

    **Raises** `ValueError` for blocks and factors that do not fit a kernel, and for targets as `wrap` does.
    """

    def new(key, w, *, block, factors):
        odd = factors > 1 and block % 2
        if block < 2 or factors < 1 or odd or w.shape[0] % (block * 2 ** (factors - 1)):
            raise ValueError(
                f"BOFT needs blocks of at least 2 inputs, even if there are more factors than one, and a kernel's "
                f"{w.shape[0]} inputs divided by block * 2**(factors - 1), not {block=} and {factors=}."
            )
        return BOFT(z=jnp.zeros((factors, w.shape[0] // block, block, block)), scale=jnp.ones(w.shape[1]))

    return wrap(params, new, targets=targets, sites=sites, key=key, block=block, factors=factors)
