"""BEFT: a vector added to what a module returns."""

import jax
import jax.numpy as jnp

from .._node import Affine, Static, Trainable, widened
from .._targets import Option, Sites, Targets
from .._tree import Params, attach, transform


class BEFT(Affine):
    r"""$y' = y + s\,v$: a trainable bias, also where the module has none.

    Huang et al., [BEFT: Bias-Efficient Fine-Tuning of Language Models in Low-Data
    Regimes](https://arxiv.org/abs/2509.15974), ACL 2026.
    """

    bias: Trainable[jax.Array, "features"]
    scale: Static[float] = 1.0

    def output(self, y, *args):
        wide = widened(y)  # a sum in bfloat16 would lose small changes
        return (wide + jnp.broadcast_to(self.scale * self.bias.astype(wide.dtype), y.shape)).astype(y.dtype)

    def merged(self, w, bias):
        if bias is None:
            raise ValueError("whose module has no bias to take it in")
        return w, bias + jnp.tile(self.scale * self.bias, bias.size // self.bias.size)


VALUES = r"(.*/)?(value|v_proj|wv|v)"


@transform
def beft(
    params: Params,
    *,
    targets: Targets = VALUES,
    scale: Option = 1.0,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Add a trainable vector to what every targeted module returns. See `BEFT`.

    **Arguments:**

    - `targets`: paths of modules, by default the projections to values, found by their usual names.
    - `scale`: $s$; a number, or a mapping from patterns of module paths to numbers.
    - `sites`: needed where modules are stacked by `nn.scan`, or own no two-dimensional kernel.
    - `key`: not used: all vectors start at zero.

    **Raises** `ValueError` for targets as `attach` does.
    """

    def new(key, features_in, features_out, *, scale):
        return BEFT(bias=jnp.zeros(features_out), scale=scale)

    return attach(params, new, name="beft", targets=targets, sites=sites, key=key, scale=scale)
