"""LST, ladder side tuning: training that goes back through a narrow side network, and not through the model."""

import re
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from .._apply import sites as sites_of
from .._targets import TABLE, named_leaves, no_match, one_of
from .._tree import Params, attach, default, modules, nodes_of, place, transform
from ..places import BLOCK, LOGITS
from ..reparam._factors import uniform
from ._ladder_nodes import Ladder, LadderStart, Rung
from ._narrow import narrowed
from ._pruned import pruned


# Where models have their last hidden states: the first of these paths that is there.
OUTLETS = ("norm", "decoder/norm", "encoder/norm", "encoder", "")

# What comes after them, and the tables of embeddings, which are the model's.
ABSENT = (TABLE, LOGITS + "/.*", r"(.*/)?pooler/.*")


@transform
def ladder(
    params: Params,
    *,
    model: nn.Module,
    reduction: int = 8,
    inputs: Sequence[Any] | None = None,
    outlet: str | None = None,
    init: Literal["random", "pruned"] = "random",
    key: jax.Array | None = None,
) -> Params:
    r"""Put a narrow network beside the model, and let what it returns take the place of the last hidden states.

    $h_0 = E D_0 + d_0$, $h_i = F_i(\mu_i h_{i-1} + (1 - \mu_i)(s_i D_i + d_i))$, and $N(h_L)\,U + u$ goes into the
    model's own head. $E$ are the embedded tokens, and $s_i$ is what the model's block $i$ returns, both cut off from
    gradients; $F_i$ and $N$ are a block and the last norm as the model has them, `reduction` times narrower, and
    $\mu_i = \sigma(\alpha_i / 0.1)$. $F$, $N$, $D$, $d$, $\alpha$, $U$ and $u$ train. See `Ladder`.

    **Arguments:**

    - `model`: whose parameters these are. It has a `config` with its widths, as those of `jpeft.models` have.
    - `reduction`: how many times narrower the side network is.
    - `inputs`: what the model is called with, arrays or shapes; by default token ids alone.
    - `outlet`: the path of the module whose result is the last hidden states, `""` for the model itself; by default the
      last norm of a decoder, and what an encoder returns.
    - `init`: of the side network: `"random"`, as the model itself starts, or `"pruned"`: what weighs most in the model.
      What feeds it and what widens it start as torch's linear layers, and the gates at one half.
    - `key`: for the side network; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for a model without such a config, a `reduction` that does not divide its widths, a second
    ladder, an unknown `init`, one that is `"pruned"` from a model of unknown parts, and where there are no blocks or is
    no outlet.
    """
    one_of("init", init, ("random", "pruned"))
    if nodes_of(params, Ladder):
        raise ValueError("This tree has a ladder: there is one side network for a model.")
    side, known = narrowed(model, reduction), modules(params)
    outlet = next(path for path in OUTLETS if path in known) if outlet is None else outlet
    blocks = [path for path in known if re.fullmatch(BLOCK, path)]
    for path, found, what in ((outlet, outlet in known, "module"), (BLOCK, blocks, "block")):
        if not found:
            raise no_match([path], list(known), what)
    inputs = [jax.ShapeDtypeStruct((1, 8), jnp.int32)] if inputs is None else inputs
    inputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tuple(inputs))
    keys = jax.random.split(default(key), 4)

    own = jax.jit(side.init)(keys[0], *inputs)["params"]
    sites = sites_of(side, {"params": own}, *inputs)
    leaves = named_leaves(own)
    absent = [name for name in leaves if any(re.fullmatch(pattern, name) for pattern in ABSENT)]
    own = _without(own, set(absent))
    own = pruned(params, own, sites, reduction) if init == "pruned" else own
    tables = [name.rpartition("/")[0] for name in absent if re.fullmatch(TABLE, name)]

    def start(key, features_in, features_out):
        down = uniform(key, (reduction * features_out, features_out), reduction * features_out)
        return {"down": down, "down_bias": jnp.zeros(features_out)}

    rung = lambda *sizes: Rung(**start(*sizes), gate=jnp.zeros(()))
    own = attach(own, rung, name="rung", targets=lambda path, _: path in blocks, sites=sites, key=keys[1])
    if tables:
        first = lambda *sizes: LadderStart(**start(*sizes))
        own = attach(own, first, name="start", targets=lambda path, _: path in tables, sites=sites, key=keys[2])
    width = sites.modules[outlet].features_out
    node = Ladder(
        side=own,
        up=uniform(keys[3], (width, reduction * width), width),
        up_bias=jnp.zeros(reduction * width),
        reduction=reduction,
        outlet=outlet,
        absent=tuple((name, leaves[name].shape) for name in absent),
    )
    return place(params, {"": node}, "ladder")


def _without(tree: Params, names: set[str], path: str = "") -> Params:
    """The tree without parameters of these names."""
    if not isinstance(tree, dict):
        return tree
    return {k: _without(x, names, f"{path}{k}/") for k, x in tree.items() if path + k not in names}
