"""Bottleneck adapters."""

import functools
import re
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.nn import initializers

from .._node import Static, Trainable
from .._operands import dropout as drop
from .._operands import fold_in
from .._targets import Option, Sites, Targets, one_of
from .._tree import Params, attach, transform
from ..places import ATTENTION_OUTPUT, BLOCK, FEED_FORWARD, FEED_FORWARD_OUTPUT
from ._hidden import Hidden


class Bottleneck(Hidden):
    r"""$f(h) = s\,g \odot (\phi(h D + d)\,U + u)$, where $g = 1$ if it does not train. See `Hidden`.

    Houlsby et al., [Parameter-Efficient Transfer Learning for NLP](https://arxiv.org/abs/1902.00751), ICML 2019.
    """

    down: Trainable[jax.Array, "in width"]
    down_bias: Trainable[jax.Array, "width"]
    up: Trainable[jax.Array, "width out"]
    up_bias: Trainable[jax.Array, "out"]
    gain: Trainable[jax.Array | None] = None  # (), or (out,)
    scale: Static[float] = 1.0
    activation: Static[str] = "gelu"
    stochastic_depth: Static[float] = 0.0

    grows = ("width",)
    scaled_by = ("up", "up_bias")

    @property
    def random(self):
        return bool(self.dropout or self.stochastic_depth)

    def change(self, h, key):
        h = affine(drop(h, self.dropout, key), self.down, self.down_bias)
        y = self.scale * affine(activation_of(self.activation)(h), self.up, self.up_bias)
        y = y if self.gain is None else y * jnp.broadcast_to(self.gain, y.shape)
        rows = jnp.ones((y.shape[0], *[1] * (y.ndim - 1)), y.dtype)
        return y * drop(rows, self.stochastic_depth, fold_in(key, 1))


def affine(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """`x @ kernel + bias`."""
    return x @ kernel + jnp.broadcast_to(bias, (*x.shape[:-1], *bias.shape))


def activation_of(name: str) -> Callable[[jax.Array], jax.Array]:
    """The function of that name in `jax.nn`, whose `gelu` is the approximation by tanh; or `gelu_exact`.

    **Raises** `ValueError` where there is none.
    """
    found = functools.partial(jax.nn.gelu, approximate=False) if name == "gelu_exact" else getattr(jax.nn, name, None)
    if not callable(found):
        raise ValueError(f"`jax.nn` has no activation {name!r}.")
    return found


GAINS = ("learned", "channel")

# init -> of D, of U
STARTS = {
    "zero": (initializers.variance_scaling(1 / 3, "fan_in", "uniform"), initializers.zeros),
    "houlsby": 2 * (initializers.truncated_normal(1e-3),),
    "adapter_plus": 2 * (initializers.truncated_normal(1e-2),),
    "bert": 2 * (initializers.normal(0.02),),
}


def arrays(key: jax.Array, init: str, features_in: int, width: int, features_out: int) -> dict[str, jax.Array]:
    """The start of a bottleneck's arrays, by name."""
    down, up = STARTS[init]
    key_down, key_up = jax.random.split(key)
    return {
        "down": down(key_down, (features_in, width)),
        "down_bias": jnp.zeros(width),
        "up": up(key_up, (width, features_out)),
        "up_bias": jnp.zeros(features_out),
    }


# The norms of the sums that feed-forward blocks are added to. Models that norm first may give another norm the name.
FEED_FORWARD_NORM = r"(.*/)?(mlp_norm|ffn_norm|ffn_layer_norm|output_layer_norm|final_layer_norm)"

# placement -> modules, activation, scale, where
PLACEMENTS = {
    "houlsby": ((ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT), "gelu", 1.0, "output"),
    "pfeiffer": ((FEED_FORWARD_OUTPUT,), "relu", 1.0, "output"),
    "double_norm": ((FEED_FORWARD_NORM,), "relu", 1.0, "norm"),
    "block": ((BLOCK,), "relu", 1.0, "output"),
    "parallel": ((FEED_FORWARD,), "relu", 4.0, "input"),
}


@transform
def bottleneck(
    params: Params,
    *,
    width: Option = None,
    reduction: Option = None,
    placement: Literal["houlsby", "pfeiffer", "double_norm", "block", "parallel"] = "houlsby",
    activation: str | None = None,
    scale: Option = None,
    dropout: Option = 0.0,
    stochastic_depth: Option = 0.0,
    init: Literal["zero", "houlsby", "adapter_plus", "bert"] = "zero",
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Put a trainable bottleneck at modules of every layer. See `Bottleneck`.

    **Arguments:**

    - `width`: of the bottleneck; a number, or a mapping from patterns of module paths to numbers, as are `reduction`,
      `scale`, `dropout` and `stochastic_depth`. By default 64.
    - `reduction`: in place of `width`: how many times narrower the bottleneck is than what goes in, rounded down.
    - `placement`: `"houlsby"` after the attention's output projection and after the feed-forward one, each before the
      residual sum; `"pfeiffer"` after the feed-forward one alone; `"double_norm"` on the norm of the feed-forward
      block's residual sum, which norms the sum once more, and `"block"` on that sum itself, what the layer returns:
      AdapterHub's Pfeiffer adapter in models that norm after the sum, and in those that norm first; `"parallel"` beside
      the whole feed-forward block.
    - `activation`: a name in `jax.nn`, or `"gelu_exact"`; by default `"gelu"` for `"houlsby"`, else `"relu"`.
    - `scale`: a number, by default 4 for `"parallel"`, else 1; `"learned"`, one number that trains from 1 on; or
      `"channel"`, one for every feature.
    - `dropout`: of the bottleneck's input, where `apply` is given a `"dropout"` key.
    - `stochastic_depth`: how often the adapter is left out for a whole row of the batch, where there is such a key.
    - `init`: `"zero"`: $D \sim U(\pm 1/\sqrt{in})$, $U = 0$, so that the model is unchanged at the start. `"houlsby"`:
      both from a normal of standard deviation $10^{-3}$, truncated at two of them; the model is nearly unchanged.
      `"adapter_plus"`: the same of $10^{-2}$. `"bert"`: both from a normal of 0.02.
    - `targets`: paths of other modules than the placement's, found by their usual names. Any module will do that takes
      and returns `(..., features)`, or a tuple whose first is.
    - `sites`: needed for modules that own no two-dimensional kernel, or are stacked by `nn.scan`.
    - `key`: for the initialisation; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for an unknown placement, activation, init or scale, a width below one, a width beside a
    reduction, rates outside `[0, 1)`, `"double_norm"` in a model that norms first, and for targets as `attach` does.
    """
    one_of("placement", placement, PLACEMENTS)
    one_of("init", init, STARTS)
    modules, phi, factor, at = PLACEMENTS[placement]
    phi = activation or phi
    activation_of(phi)
    if width is not None and reduction is not None:
        raise ValueError("`width` and `reduction` both say how wide a bottleneck is: give one of them.")
    if at == "norm" and targets is None and sites is not None:
        _check_order(sites)

    def new(key, features_in, features_out, *, width, reduction, scale, dropout, stochastic_depth):
        features_in = features_in if at == "input" else features_out
        width = width if width is not None else 64 if reduction is None else max(1, int(features_in // reduction))
        if width < 1 or not 0 <= dropout < 1 or not 0 <= stochastic_depth < 1:
            raise ValueError(
                "A bottleneck has a width of at least 1, and rates in [0, 1), not "
                f"{width=}, {dropout=}, {stochastic_depth=}."
            )
        if isinstance(scale, str):
            one_of("scale", scale, GAINS)
        return Bottleneck(
            **arrays(key, init, features_in, width, features_out),
            gain=jnp.ones(features_out if scale == "channel" else ()) if scale in GAINS else None,
            scale=factor if scale is None else 1.0 if scale in GAINS else scale,
            activation=phi,
            at=at,
            dropout=dropout,
            stochastic_depth=stochastic_depth,
        )

    return attach(
        params, new, name="bottleneck", targets=modules if targets is None else targets, sites=sites, key=key,
        width=width, reduction=reduction, scale=scale, dropout=dropout, stochastic_depth=stochastic_depth,
    )  # fmt: skip


def _check_order(sites: Sites) -> None:
    """**Raises** `ValueError`, with every path, for norms that come before their feed-forward blocks."""
    order = list(sites.modules)
    beside = lambda path: path.rpartition("/")[0]
    blocks = {beside(path): n for n, path in enumerate(order) if re.fullmatch(FEED_FORWARD, path)}
    norms = {path: n for n, path in enumerate(order) if re.fullmatch(FEED_FORWARD_NORM, path)}
    if early := [path for path, n in norms.items() if n < blocks.get(beside(path), -1)]:
        raise ValueError(
            f"These norms come before their feed-forward blocks, and are of no residual sum: {', '.join(early)}. In "
            "such a model AdapterHub's adapter acts on the sum itself: placement='block'."
        )
