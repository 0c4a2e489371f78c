"""MAM: a prefix in the attention, and a scaled adapter in parallel with the feed-forward block."""

from typing import Literal

import jax

from .._targets import Option, Sites
from .._tree import Params, chain, transform
from ..additive._bottleneck import bottleneck
from ..additive._prefix import prefix


@transform
def mam(
    params: Params,
    *,
    length: int = 30,
    prefix_width: int | None = 800,
    prefix_init: Literal["normal", "zeros"] = "normal",
    width: Option = 512,
    scale: Option = 4.0,
    dropout: Option = 0.0,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Put a `prefix` before the keys of every layer, and a parallel `bottleneck` beside its feed-forward block.

    The Mix-And-Match adapter of He et al., [Towards a Unified View of Parameter-Efficient Transfer
    Learning](https://arxiv.org/abs/2110.04366), ICLR 2022, and its sizes for summaries of news.

    **Arguments:**

    - `length`, `prefix_width`, `prefix_init`: of the prefix: `length`, `width` and `init` of `prefix`. After training
      `collapse` drops the network that makes it; `prefix_width=None` does without one.
    - `width`, `scale`, `dropout`: of the adapter: those of `bottleneck`.
    - `sites`: has the shapes of keys and values. It must be given.
    - `key`: for both; `jax.random.key(0)` if left out.

    **Raises** `ValueError` as `prefix` and `bottleneck` do.
    """
    both = chain(
        prefix(length=length, width=prefix_width, init=prefix_init),
        bottleneck(placement="parallel", width=width, scale=scale, dropout=dropout),
    )
    return both(params, sites=sites, key=key)
