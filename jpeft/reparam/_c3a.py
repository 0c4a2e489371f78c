"""C3A: circular convolutions."""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from .._mesh import by_rows
from .._node import Branch, Trainable
from .._shim import row_major
from .._targets import Option, Sites, Targets, one_of
from .._tree import Params, transform, wrap


class C3A(Branch):
    r"""$W' = W + C$, of blocks $C^{ij}_{pq} = c^{ij}_{(p - q) \bmod b} / in$: each is circulant.

    $x C$ is a sum of circular correlations, of which each is a product of Fourier transforms, in float32.

    Chen et al., [Parameter-Efficient Fine-Tuning via Circular Convolution](https://arxiv.org/abs/2407.19342), 2024.
    """

    c: Trainable[jax.Array, "blocks_in blocks_out block"]

    def weight(self, w):
        n = jnp.arange(self.c.shape[-1])
        blocks = self.c[:, :, n[:, None] - n[None]]  # of a negative place, the one from the end
        return w + blocks.swapaxes(1, 2).reshape(w.shape) / len(w)

    def branch(self, x, key):
        return by_rows(self._correlated, x, self.c)

    @staticmethod
    def _correlated(x, c):
        blocks, _, block = c.shape
        c = row_major(jnp.fft.rfft(c.astype(jnp.float32)))
        z = row_major(jnp.fft.rfft(x.astype(jnp.float32).reshape(*x.shape[:-1], blocks, block)))
        y = row_major(jnp.fft.irfft(jnp.einsum("...if,iof->...of", z, c.conj()), block))
        return (y.reshape(*x.shape[:-1], -1) / x.shape[-1]).astype(x.dtype)


@transform
def c3a(
    params: Params,
    *,
    block: Option = None,
    init: Literal["xavier", "zeros"] = "xavier",
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Add a matrix of circulant blocks to every targeted kernel. See `C3A`.

    **Arguments:**

    - `block`: the size of a block, which divides inputs and outputs; a number, or a mapping from patterns to numbers.
      By default the largest there is.
    - `init`: `"xavier"`, the method's own, is $c \sim U(\pm\sqrt{6 / (in + out)})$: **the model is another one from
      the start**. `"zeros"` leaves it as it was.
    - `targets`, `sites`: which kernels. By default every one but the output head.
    - `key`: for $c$; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for an unknown `init`, a block that does not divide both sides of a kernel, and for targets
    as `wrap` does.
    """
    one_of("init", init, ("xavier", "zeros"))

    def new(key, w, *, block):
        size = math.gcd(*w.shape) if block is None else block
        if size < 1 or any(n % size for n in w.shape):
            raise ValueError(f"C3A needs blocks that divide both sides of a kernel {w.shape}, not {size}.")
        bound = (6 / sum(w.shape)) ** 0.5 if init == "xavier" else 0.0
        blocks = (w.shape[0] // size, w.shape[1] // size, size)
        return C3A(c=jax.random.uniform(key, blocks, minval=-bound, maxval=bound))

    return wrap(params, new, targets=targets, sites=sites, key=key, block=block)
