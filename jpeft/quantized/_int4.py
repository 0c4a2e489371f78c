"""4-bit integers."""

import jax
import jax.numpy as jnp

from .._node import Frozen
from .._targets import Option, Sites, Targets
from .._tree import Params, transform, wrap
from ._codes import Codes, grouped, pack, poison, unpack


class Int4(Codes):
    r"""$W_{ij} \approx s_{gj}\,(q_{ij} - z_{gj})$ with codes $q \in [0, 15]$, for groups $g$ of inputs of output $j$.

    Let $[l, h]$ be the range of a group's weights and zero.

    - Symmetric: $z = 8$, that is signed codes -8..7, and $s = \max(h / 7, -l / 8)$. `4 + 32 / group` bits a weight.
    - Asymmetric: $s = (h - l) / 15$ and $z = \mathrm{round}(-l / s)$. `4 + 40 / group` bits a weight; `4 + 64 / group`
      once `merge_into_zeros` has changed $z$, which is no integer then.

    Both hold zero exactly and clip nothing: the error is at most $s / 2$.
    """

    codes: Frozen[jax.Array, "in out"]  # uint8, two rows a byte
    scale: Frozen[jax.Array, "group out"]  # float32
    zero: Frozen[jax.Array | None, "group out"] = None  # uint8, or float32; none if symmetric

    def decode(self):
        codes = unpack(self.codes, len(self.scale)).astype(jnp.float32)
        zero = 8.0 if self.zero is None else self.zero.astype(jnp.float32)[:, None]
        return ((codes - zero) * self.scale[:, None]).reshape(-1, self.codes.shape[1])


def _quantize(key, w, *, group, symmetric):
    w = grouped(w, group)
    low, high = jnp.minimum(jnp.min(w, axis=1), 0.0), jnp.maximum(jnp.max(w, axis=1), 0.0)
    scale = poison(jnp.maximum(high / 7, -low / 8) if symmetric else (high - low) / 15, w)
    safe = jnp.where(scale == 0, 1.0, scale)
    zero = jnp.full_like(low, 8) if symmetric else jnp.round(-low / safe)
    codes = jnp.clip(jnp.round(w / safe[:, None]) + zero[:, None], 0, 15)
    return Int4(codes=pack(codes), scale=scale, zero=None if symmetric else zero.astype(jnp.uint8))


@transform
def int4(
    params: Params,
    *,
    group: Option = 64,
    symmetric: Option = True,
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    """Round every targeted kernel to 4 bits. See `Int4`.

    **Arguments:**

    - `group`: how many weights along the inputs share a constant, an even number. Where it does not divide the inputs,
      the last group is stored filled up.
    - `symmetric`: whether the codes are spread around zero, or over the range of each group. Each option is one value,
      or a mapping from patterns to values.
    - `targets`, `sites`: which kernels. By default every one but the output head.
    - `key`: not used; rounding is to the nearest code.

    **Raises** `ValueError` for a group that is odd or below one, for a kernel that is a node already, and for targets
    as `wrap` does.
    """
    how = {"group": group, "symmetric": symmetric}
    return wrap(params, _quantize, targets=targets, sites=sites, key=key, over_nodes=False, **how)
