"""(IA)^3: a factor for every feature."""

from typing import Literal

import jax
import jax.numpy as jnp

from .._node import Affine, Static, Trainable, widened
from .._targets import Sites, Targets
from .._tree import Params, attach, transform
from ..places import FEED_FORWARD_OUTPUT


class IA3(Affine):
    r"""$y' = y \odot l$ for what comes out of a module, its bias included; or $x' = x \odot l$ for what goes in.

    Liu et al., [Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
    Learning](https://arxiv.org/abs/2205.05638), NeurIPS 2022.
    """

    scale: Trainable[jax.Array, "features"]
    side: Static[Literal["in", "out"]] = "out"

    def inputs(self, x, *args):
        return (_times(x, self.scale) if self.side == "in" else x, *args)

    def output(self, y, *args):
        return _times(y, self.scale) if self.side == "out" else y

    def merged(self, w, bias):
        if self.side == "in":
            return w * _along(self.scale, w.shape[0])[:, None], bias
        scale = _along(self.scale, w.shape[1])
        return w * scale[None], None if bias is None else bias * scale


def _times(x: jax.Array, scale: jax.Array) -> jax.Array:
    """In float32 at least: a factor near 1 has 7 bits in bfloat16."""
    wide = widened(x)
    return (wide * jnp.broadcast_to(scale.astype(wide.dtype), x.shape)).astype(x.dtype)


def _along(scale: jax.Array, size: int) -> jax.Array:
    """For all of a matrix's `size` rows or columns, where the factors are those of a kernel's last axis."""
    return jnp.tile(scale, size // scale.size)


KEYS_AND_VALUES = r"(.*/)?(key|value|k_proj|v_proj|wk|wv|k|v|qkv|c_attn|query_key_value|qkv_proj)"


@transform
def ia3(
    params: Params,
    *,
    targets: Targets | None = KEYS_AND_VALUES,
    feedforward: Targets | None = FEED_FORWARD_OUTPUT,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Scale keys, values and the activations inside feed-forward blocks by trainable factors. See `IA3`.

    **Arguments:**

    - `targets`: paths of modules whose *outputs* are scaled, by default the projections to keys and values, found by
      their usual names; one that makes the queries, too, is scaled as a whole. `None` for no module.
    - `feedforward`: paths of modules whose *inputs* are scaled, by default the last projections of feed-forward blocks.
      `None` for no module.
    - `sites`: needed where modules are stacked by `nn.scan`, or own no two-dimensional kernel.
    - `key`: not used: all factors start at 1.

    **Raises** `ValueError` if there is nothing to scale, and for targets as `attach` does.
    """
    if targets is None and feedforward is None:
        raise ValueError("Both `targets` and `feedforward` are None: there is nothing to scale.")

    def outputs(key, features_in, features_out):
        return IA3(scale=jnp.ones(features_out), side="out")

    def inputs(key, features_in, features_out):
        return IA3(scale=jnp.ones(features_in), side="in")

    for new, chosen in ((outputs, targets), (inputs, feedforward)):
        if chosen is not None:
            params = attach(params, new, name="ia3", targets=chosen, sites=sites, key=key)
    return params
