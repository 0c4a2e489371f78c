"""UniPELT: LoRA, a prefix and an adapter, each with a gate."""

import re

import jax
import jax.numpy as jnp

from .._node import Trainable, is_node
from .._operands import dropout as drop
from .._targets import Sites, Targets, name_of, select
from .._tree import Params, attach, default, nodes_of, place, transform
from ..additive._bottleneck import bottleneck
from ..additive._hidden import Hidden
from ..additive._prefix import prefix
from ..places import BLOCK, KEYS_AND_VALUES
from ..reparam._factors import check, uniform
from ._gates import Gated, GatedPrefix, Gates, LayerGates, PrefixGate


class LowRankTerm(Hidden):
    r"""$f(h) = \mathrm{drop}(h) A B$: what `LoRA` adds, beside the module that has the kernel."""

    a: Trainable[jax.Array, "in rank"]
    b: Trainable[jax.Array, "rank out"]

    def change(self, h, key):
        return drop(h, self.dropout, key) @ self.a @ self.b


QUERY_AND_VALUE = r"(.*/)?(query|value|q_proj|v_proj|wq|wv|q|v|q_lin|v_lin)"


@transform
def unipelt(
    params: Params,
    *,
    rank: int = 8,
    length: int = 10,
    prefix_width: int | None = 512,
    width: int = 48,
    dropout: float = 0.0,
    over_padding: bool = False,
    targets: Targets = QUERY_AND_VALUE,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""LoRA at queries and values, a prefix, and an adapter after the feed-forward block, each with a `Gate`.

    With $g = \mathrm{mean}_t\,\sigma(h_t w + b)$, a number for each example and each part of a layer:
    $y' = y + g\,x A B$ without another scale, $K' = [g P_K; K]$ and $V' = [g P_V; V]$, and
    $y' = y + g\,(\phi(y D + d) U + u)$. $h$ is what goes into the projection, the attention, and the adapter.

    Mao et al., [UniPELT](https://arxiv.org/abs/2110.07577), ACL 2022.

    **Arguments:**

    - `rank`, `dropout`: of LoRA.
    - `length`, `prefix_width`: of the prefix: `length` and `width` of `prefix`.
    - `width`: of the adapter, which is `bottleneck(placement="pfeiffer")`.
    - `over_padding`: whether the mean is over padding, too, as in the authors' code. By default it is over the tokens
      of `attention_mask`; a call with a `gate_mask` `(batch, seq)` in any case averages over the tokens of that.
    - `targets`: paths of the projections to queries and values.
    - `sites`: has the shapes of keys and values. It must be given.
    - `key`: for all starts; `jax.random.key(0)` if left out. The gates start near one half.

    **Raises** `ValueError` for a rank below one, a dropout outside `[0, 1)`, a second one in a tree, and as `prefix`
    and `bottleneck` do.
    """
    check(rank, dropout)
    if nodes_of(params, Gates):
        raise ValueError("This tree has gates: a cache has room for those of one UniPELT.")
    keys = jax.random.split(default(key), 4)

    def new(key, features_in, features_out):
        a = uniform(key, (features_in, rank), features_in)
        return LowRankTerm(a=a, b=jnp.zeros((rank, features_out)), dropout=dropout, at="input")

    made = prefix(params, length=length, width=prefix_width, sites=sites, key=keys[2])
    found = select(KEYS_AND_VALUES, sites.modules, "module")
    made = place(made, dict.fromkeys(found, GatedPrefix(length=length)), "gated_prefix")
    made = attach(made, new, name="low_rank_term", targets=targets, sites=sites, key=keys[0])
    made = bottleneck(made, placement="pfeiffer", width=width, sites=sites, key=keys[1])
    terms = {name: x for name, x in nodes_of(made, Hidden).items() if name not in nodes_of(params, Hidden)}

    owners = {name: name.rpartition("/")[0] for name in terms} | {n: n.rpartition("/")[0] for n in found}
    slots = _slots(owners)
    gates = dict(zip(owners, jax.random.split(keys[3], len(owners)), strict=True))

    def gate(name):
        call = sites.modules[owners[name]]
        size = call.features_out if name in terms and terms[name].at == "output" else call.features_in
        weights = 0.02 * jax.random.normal(gates[name], (*call.stack, size))
        return {"gate": weights, "gate_bias": jnp.zeros(call.stack), "slot": slots[name][1]}

    def gated(path, x):
        name = name_of(path)
        return Gated(inner=x, at=x.at, **gate(name)) if name in terms else x

    made = jax.tree_util.tree_map_with_path(gated, made, is_leaf=is_node)
    made = place(made, {owners[path]: PrefixGate(**gate(path)) for path in found}, "prefix_gate")
    count = 1 + max(slot for _, slot in slots.values())
    blocks = {block for block, _ in slots.values() if block is not None}
    made = place(made, dict.fromkeys(blocks, LayerGates(count=count)), "layer_gates")
    return place(made, {"": Gates(count=count, over_padding=over_padding)}, "gates")


def _slots(owners: dict[str, str]) -> dict[str, tuple[str | None, int]]:
    """The block of layers that every gate is in, by its module, and its number there."""
    found: dict[str, tuple[str | None, int]] = {}
    for name, owner in owners.items():
        parts = owner.split("/")
        around = ("/".join(parts[:n]) for n in range(1, len(parts)))
        block = next((path for path in around if re.fullmatch(BLOCK, path)), None)
        found[name] = block, sum(other == block for other, _ in found.values())
    return found
