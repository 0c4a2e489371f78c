"""Bottleneck adapters."""

from typing import Literal

import jax
import jax.numpy as jnp

from .._node import Additive, Static, Trainable
from .._operands import dropout as drop
from .._targets import FEED_FORWARD, Option, Sites, Targets, one_of
from .._tree import Params, attach, transform


class Bottleneck(Additive):
    r"""$y' = y + s\,(\phi(h D + d)\,U + u)$, with $h = y$, or $h = x$ (the module's input) if parallel.

    Houlsby et al., [Parameter-Efficient Transfer Learning for NLP](https://arxiv.org/abs/1902.00751), ICML 2019.
    """

    down: Trainable[jax.Array, "in width"]
    down_bias: Trainable[jax.Array, "width"]
    up: Trainable[jax.Array, "width out"]
    up_bias: Trainable[jax.Array, "out"]
    scale: Static[float] = 1.0
    activation: Static[str] = "gelu"
    parallel: Static[bool] = False
    dropout: Static[float] = 0.0

    def around(self, call, key, *args, **kwargs):
        result = call(*args, **kwargs)
        y = result[0] if isinstance(result, tuple) else result
        x = args[0] if args else next(iter(kwargs.values()), None)
        h = drop(x if self.parallel else y, self.dropout, key)
        down, down_bias, up, up_bias = (a.astype(h.dtype) for a in (self.down, self.down_bias, self.up, self.up_bias))
        h = getattr(jax.nn, self.activation)(_affine(h, down, down_bias))
        y = y + (self.scale * _affine(h, up, up_bias)).astype(y.dtype)
        return (y, *result[1:]) if isinstance(result, tuple) else y


def _affine(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    return x @ kernel + jnp.broadcast_to(bias, (*x.shape[:-1], *bias.shape))


_ATTENTION = r"(.*/)?(\w*attention|\w*attn)(_\d+)?"
ATTENTION_OUT = _ATTENTION + "/(out|o_proj|out_proj|c_proj|output|wo|dense)"
MLP_OUT = FEED_FORWARD + "/(down|down_proj|out|c_proj|fc2|wo|output|dense)"

# placement -> modules, activation, scale, parallel
PLACEMENTS = {
    "houlsby": ((ATTENTION_OUT, MLP_OUT), "gelu", 1.0, False),
    "pfeiffer": ((MLP_OUT,), "relu", 1.0, False),
    "parallel": ((FEED_FORWARD,), "relu", 4.0, True),
}


@transform
def bottleneck(
    params: Params,
    *,
    width: Option = 64,
    placement: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby",
    activation: str | None = None,
    scale: Option = None,
    dropout: Option = 0.0,
    init: Literal["zero", "houlsby"] = "zero",
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Put a trainable bottleneck at modules of every layer. See `Bottleneck`.

    **Arguments:**

    - `width`: of the bottleneck; a number, or a mapping from patterns of module paths to numbers, as are `scale` and
      `dropout`.
    - `placement`: `"houlsby"` after the attention's output projection and after the feed-forward one, each before the
      residual sum; `"pfeiffer"` after the feed-forward one alone; `"parallel"` beside the whole feed-forward block,
      scaled by 4 (He et al., <https://arxiv.org/abs/2110.04366>). Houlsby et al. train the norms and the head, too:
      `jpeft.chain(jpeft.bottleneck(), jpeft.norms())`. AdapterHub's `"pfeiffer"` applies the block's norm twice in
      models that norm after the sum; this one does not.
    - `activation`: a name in `jax.nn`; by default `"gelu"` for `"houlsby"`, else `"relu"`.
    - `dropout`: of the bottleneck's input, where `apply` is given a `"dropout"` key.
    - `init`: `"zero"`: $D \sim U(\pm 1/\sqrt{in})$, $U = 0$, so that the model is unchanged at the start. `"houlsby"`:
      both from a normal of standard deviation $10^{-3}$, truncated at two of them; the model is nearly unchanged.
    - `targets`: paths of other modules than the placement's, found by their usual names. Any module will do that takes
      and returns `(..., features)`, or a tuple whose first is.
    - `sites`: needed for modules that own no two-dimensional kernel, or are stacked by `nn.scan`.
    - `key`: for the initialisation; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for an unknown placement or activation, a width below one, a dropout outside `[0, 1)`, and
    for targets as `attach` does.
    """
    one_of("placement", placement, PLACEMENTS)
    one_of("init", init, ("zero", "houlsby"))
    modules, phi, factor, parallel = PLACEMENTS[placement]
    phi = activation or phi
    if not callable(getattr(jax.nn, phi, None)):
        raise ValueError(f"`jax.nn` has no activation {phi!r}.")

    def new(key, features_in, features_out, *, width, scale, dropout):
        if width < 1 or not 0 <= dropout < 1:
            raise ValueError(f"A bottleneck has a width of at least 1 and dropout in [0, 1), not {width=}, {dropout=}.")
        features_in = features_in if parallel else features_out
        key_down, key_up = jax.random.split(key)
        if init == "zero":
            down = jax.random.uniform(key_down, (features_in, width), minval=-1.0, maxval=1.0) / features_in**0.5
            up = jnp.zeros((width, features_out))
        else:
            down = 1e-3 * jax.random.truncated_normal(key_down, -2.0, 2.0, (features_in, width))
            up = 1e-3 * jax.random.truncated_normal(key_up, -2.0, 2.0, (width, features_out))
        return Bottleneck(
            down=down,
            down_bias=jnp.zeros(width),
            up=up,
            up_bias=jnp.zeros(features_out),
            scale=factor if scale is None else scale,
            activation=phi,
            parallel=parallel,
            dropout=dropout,
        )

    return attach(
        params, new, name="bottleneck", targets=modules if targets is None else targets, sites=sites, key=key,
        width=width, scale=scale, dropout=dropout,
    )  # fmt: skip
