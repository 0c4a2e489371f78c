"""RoAd: rotations of pairs of outputs."""

from typing import Literal

import jax
import jax.numpy as jnp

from .._node import Affine, Trainable, widened
from .._targets import Option, Sites, Targets, one_of
from .._tree import Params, attach, transform


class RoAd(Affine):
    r"""$z' = z \odot \alpha \cos\theta + \tilde z \odot \alpha \sin\theta$, for what comes out of a module.

    Of the pair $(z_i, z_{i + g/2})$, in groups of $g$ outputs, $\tilde z$ is $(-z_{i + g/2}, z_i)$. The axes `trig` and
    `side` are of size one or two: whether cosine and sine, and the two of a pair, have angles of their own.

    Liao and Monz, [3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and
    Composability](https://arxiv.org/abs/2409.00119), NeurIPS 2024.
    """

    theta: Trainable[jax.Array, "groups trig side half"]
    alpha: Trainable[jax.Array, "groups trig side half"]

    def output(self, y, *args):
        return self.turned(y)

    def merged(self, w, bias):
        return self.turned(w), None if bias is None else self.turned(bias)

    def turned(self, z: jax.Array) -> jax.Array:
        """What becomes of outputs `(..., out)`, or of several such side by side, in float32 at least."""
        groups, _, _, half = self.theta.shape
        wide = widened(z).reshape(-1, groups, 2, half)
        theta, alpha = (jnp.broadcast_to(p.astype(wide.dtype), (groups, 2, 2, half)) for p in (self.theta, self.alpha))
        cosine, sine = alpha[:, 0] * jnp.cos(theta[:, 0]), alpha[:, 1] * jnp.sin(theta[:, 1])
        first, second = jnp.unstack(wide, axis=2)
        turned = wide * cosine[None] + jnp.stack([-second, first], axis=2) * sine[None]
        return turned.reshape(z.shape).astype(z.dtype)


SIDES = {1: (1, 1), 2: (1, 2), 4: (2, 2)}  # variant -> how many angles for cosine and sine, and for the two of a pair


@transform
def road(
    params: Params,
    *,
    targets: Targets,
    variant: Literal[1, 2, 4] = 1,
    group: Option = 64,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Rotate pairs of what comes out of every targeted module, and scale them. See `RoAd`.

    **Arguments:**

    - `targets`: paths of modules, those with a kernel: `".*/(query|value)"`.
    - `variant`: how many angles and scales two outputs have: 1, one of each for both; 2, each of the two its own; 4,
      cosine and sine their own, too.
    - `group`: within how many outputs pairs are formed, an even number that divides a module's outputs; or a mapping
      from patterns to numbers.
    - `sites`: needed where modules are stacked by `nn.scan`, or own no two-dimensional kernel.
    - `key`: not used: $\theta$ starts at zero and $\alpha$ at one.

    **Raises** `ValueError` for an unknown variant, a group that is odd or does not divide the outputs, and for targets
    as `attach` does.
    """
    one_of("variant", variant, SIDES)

    def new(key, features_in, features_out, *, group):
        if group < 2 or group % 2 or features_out % group:
            raise ValueError(f"RoAd needs an even group that divides a module's {features_out} outputs, not {group}.")
        shape = (features_out // group, *SIDES[variant], group // 2)
        return RoAd(theta=jnp.zeros(shape), alpha=jnp.ones(shape))

    return attach(params, new, name="road", targets=targets, sites=sites, key=key, group=group)
