"""FourierFT: a few entries of a kernel's Fourier transform."""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from .._mesh import undivided
from .._node import Branch, Frozen, Static, Trainable
from .._operands import Operand
from .._shared import share
from .._shim import row_major
from .._targets import Sites, Targets, one_of
from .._tree import Params, default, transform, wrap
from ..selective._sparse import random_indices
from ._sizes import sizes


class FourierFT(Branch):
    r"""$W' = W + \alpha\,\mathrm{Re}\,F^{-1}(S)$: $S$ has the real entries $c$ at random places, and zeros elsewhere.

    $F^{-1}$ is the inverse discrete Fourier transform in both axes, in float32. The places are `indices`, which count
    the entries of the `(in, out)` matrix row by row; kernels of one shape share them.

    Gao et al., [Parameter-Efficient Fine-Tuning with Discrete Fourier Transform](https://arxiv.org/abs/2405.03003),
    ICML 2024.
    """

    c: Trainable[jax.Array, "frequencies"]
    indices: Frozen[jax.Array, "frequencies"]  # int32
    shape: Static[tuple[int, int]]
    scale: Static[float] = 150.0

    def weight(self, w):
        return w + self.change().astype(w.dtype)

    def branch(self, x, key):
        times = lambda x: x @ self.change().astype(x.dtype)
        return times(x) if isinstance(x, Operand) else jax.checkpoint(times)(x)  # or the change would be kept

    def change(self) -> jax.Array:
        r"""$\alpha\,\mathrm{Re}\,F^{-1}(S)$ `(in, out)`."""
        d_in, d_out = self.shape
        spectrum = jnp.zeros(d_in * d_out).at[self.indices].set(self.c.astype(jnp.float32))
        change = undivided(jnp.fft.ifft2(spectrum.reshape(d_in, d_out)).real)  # XLA for CPU fails on a part of it
        return self.scale * row_major(change)


@transform
def fourierft(
    params: Params,
    *,
    frequencies: int = 1000,
    scale: float = 150.0,
    init: Literal["normal", "zeros"] = "normal",
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Add a matrix of few frequencies to every targeted kernel. See `FourierFT`.

    **Arguments:**

    - `frequencies`: how many entries of the spectrum train; one number, for kernels share their places.
    - `scale`: $\alpha$.
    - `init`: the start of $c$. `"normal"`, the method's own, is $N(0, 1)$: **the model is another one from the start**,
      by entries of about $\alpha \sqrt{n / 2} / (in \cdot out)$ for $n$ frequencies. `"zeros"` leaves it as it was.
    - `targets`, `sites`: which kernels. By default every one but the output head.
    - `key`: for the places and for $c$; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for an unknown `init`, for less than one frequency or more than a kernel has entries, and
    for targets as `wrap` does.
    """
    one_of("init", init, ("normal", "zeros"))
    key, found = default(key), sizes(params, targets, sites)
    small = [f"  {name}: {shape}" for name, shape in found.items() if not 1 <= frequencies <= math.prod(shape)]
    if small:
        raise ValueError(f"These kernels do not have {frequencies} frequencies:\n" + "\n".join(small))
    shapes = sorted(set(found.values()))
    places = {
        f"fourierft_{d_in}x{d_out}": random_indices(k, (d_in, d_out), frequencies)
        for k, (d_in, d_out) in zip(jax.random.split(key, len(shapes)), shapes, strict=True)
    }
    params, refs = share(params, **places)

    def new(key, w):
        c = jax.random.normal(key, (frequencies,)) if init == "normal" else jnp.zeros(frequencies)
        return FourierFT(c=c, indices=refs[f"fourierft_{w.shape[0]}x{w.shape[1]}"], shape=w.shape, scale=scale)

    return wrap(params, new, targets=targets, sites=sites, key=key)
