"""8-bit integers."""

import jax
import jax.numpy as jnp

from .._node import Frozen
from .._targets import Option, Sites, Targets
from .._tree import Params, transform, wrap
from ._codes import Codes, grouped, poison


class Int8(Codes):
    r"""$W_{ij} \approx s_{gj}\,q_{ij}$ with codes $q \in [-127, 127]$, and for every group $g$ of inputs and output $j$

    $$s_{gj} = \max_{i \in g} |W_{ij}| / 127, \qquad q_{ij} = \mathrm{round}(W_{ij} / s_{gj}).$$

    `8 + 32 / group` bits a weight; with one group a column `8 + 32 / in`. The error is at most $s / 2$.

    Dettmers et al., [LLM.int8(): 8-bit Matrix Multiplication for Transformers at
    Scale](https://arxiv.org/abs/2208.07339), NeurIPS 2022: its vector-wise constants, of the weights alone.
    """

    codes: Frozen[jax.Array, "in out"]  # int8
    scale: Frozen[jax.Array, "group out"]  # float32

    packed = False

    def decode(self):
        codes = self.codes.reshape(len(self.scale), -1, self.codes.shape[1])
        return (codes.astype(jnp.float32) * self.scale[:, None]).reshape(self.codes.shape)


def _quantize(key, w, *, group):
    w = grouped(w, len(w) if group is None else group)
    scale = poison(jnp.max(jnp.abs(w), axis=1) / 127, w)
    codes = jnp.round(w / jnp.where(scale == 0, 1.0, scale)[:, None]).astype(jnp.int8)
    return Int8(codes=codes.reshape(-1, w.shape[2]), scale=scale)


@transform
def int8(
    params: Params,
    *,
    group: Option = None,
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    """Round every targeted kernel to 8 bits. See `Int8`.

    **Arguments:**

    - `group`: how many weights along the inputs share a constant; a number, or a mapping from patterns to numbers.
      Left out, one constant an output. Where it does not divide the inputs, the last group is stored filled up.
    - `targets`, `sites`: which kernels. By default every one but the output head.
    - `key`: not used; rounding is to the nearest code.

    **Raises** `ValueError` for a group below one, for a kernel that is a node already, and for targets as `wrap` does.
    """
    return wrap(params, _quantize, targets=targets, sites=sites, key=key, over_nodes=False, group=group)
