"""Compacter: bottleneck adapters whose matrices are sums of Kronecker products."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from .._node import Trainable
from .._shared import share
from .._targets import Option, Sites, Targets, one_of
from .._tree import Params, attach, default, nodes_of, transform
from ..places import ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT
from ..selective._unfreeze import Free
from ._hidden import Hidden


class Compacter(Hidden):
    r"""$f(h) = \mathrm{gelu}(h D + d)\,U + u$ with $D = \sum_i A_i \otimes (S_i T_i)$, and $U$ alike. See `Hidden`.

    The rule $A$ is one for both, and may be one for all nodes.

    Karimi Mahabadi et al., [Compacter](https://arxiv.org/abs/2106.04647), NeurIPS 2021. Where $S_i T_i$ is one matrix
    $S_i$ without a $T_i$, it is their PHM adapter.
    """

    rule: Trainable[Any, "terms terms terms"]
    down_left: Trainable[jax.Array, "terms in_part rank"]
    down_right: Trainable[jax.Array | None, "terms rank width_part"]
    down_bias: Trainable[jax.Array, "width"]
    up_left: Trainable[jax.Array, "terms width_part rank"]
    up_right: Trainable[jax.Array | None, "terms rank out_part"]
    up_bias: Trainable[jax.Array, "out"]

    def change(self, h, key):
        h = kronecker(h, self.rule, self.down_left, self.down_right, self.down_bias)
        return kronecker(jax.nn.gelu(h), self.rule, self.up_left, self.up_right, self.up_bias)


def kronecker(x: jax.Array, rule: jax.Array, left: jax.Array, right: jax.Array | None, bias: jax.Array) -> jax.Array:
    r"""$x \sum_i A_i \otimes (S_i T_i) + b$: `(..., in)` -> `(..., out)`. No $A_i \otimes (S_i T_i)$ is formed.

    `rule` is $A$ `(terms, terms, terms)`, `left` $S$ `(terms, in / terms, rank)`, and `right` $T$
    `(terms, rank, out / terms)`, the identity if `None`.
    """
    x = x.reshape(*x.shape[:-1], len(rule), -1)
    y = jnp.einsum("...ap,ipr->...iar", x, left)
    y = jnp.einsum("...iar,iab->...ibr", y, rule)
    y = y.sum(-3) if right is None else jnp.einsum("...ibr,irq->...bq", y, right)
    return y.reshape(*y.shape[:-2], -1) + jnp.broadcast_to(bias, (*y.shape[:-2], *bias.shape))


SELF_ATTENTION_OUTPUT = r"(?!.*(?i:cross|encdec|encoder)_?(?i:attention|attn))" + ATTENTION_OUTPUT
PLACEMENTS = {"compacter": (SELF_ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT), "compacter++": (FEED_FORWARD_OUTPUT,)}


@transform
def compacter(
    params: Params,
    *,
    terms: int = 4,
    reduction: Option = 32,
    rank: Option = 1,
    placement: Literal["compacter", "compacter++"] = "compacter",
    rule: Literal["shared", "frozen", "own"] = "shared",
    deviation: float = 0.01,
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Put a bottleneck made of Kronecker products at modules of every layer. See `Compacter`.

    A rule that is shared is at `params["jpeft_shared"]`. The start is near the model as it was, and not exact. The
    authors train the norms, too: `jpeft.chain(jpeft.compacter(), jpeft.norms())`.

    **Arguments:**

    - `terms`: how many products are summed, $n$. It divides the features and the width of every adapter.
    - `reduction`: the width is the features by this, rounded down; a number, or a mapping from patterns of module paths
      to numbers, as is `rank`.
    - `rank`: of each $S_i T_i$. `None` is a full matrix: the PHM adapter.
    - `placement`: `"compacter"` after the output projections of self-attention and of feed-forward blocks, before the
      residual sums; `"compacter++"` after those of the feed-forward blocks alone.
    - `rule`: $A$ is `"shared"` by all adapters, and trains; is shared and `"frozen"`; or every adapter has its `"own"`.
    - `deviation`: the standard deviation of $A$ at the start. The authors' is 0.01 for an adapter's own, and 0.0001 for
      one that is shared.
    - `targets`: paths of other modules than the placement's, found by their usual names.
    - `sites`: needed for modules that own no two-dimensional kernel, or are stacked by `nn.scan`.
    - `key`: for $A \sim N(0, \sigma^2)$, and for $S_i$ and $T_i \sim U(\pm\sqrt{12 / (rows + columns)})$;
      `jax.random.key(0)` if left out.

    **Raises** `ValueError` for an unknown placement or rule, a number below one, and for targets as `attach` does; for
    modules whose features or width `terms` does not divide, with every path.
    """
    one_of("placement", placement, PLACEMENTS)
    one_of("rule", rule, ("shared", "frozen", "own"))
    if terms < 1:
        raise ValueError(f"A sum of Kronecker products has at least one, not {terms=}.")
    of_rule, key = jax.random.split(default(key))
    draw = lambda key: deviation * jax.random.normal(key, (terms, terms, terms))
    refs = {}
    if rule != "own":
        params, refs = share(params, compacter_rule=draw(of_rule) if rule == "frozen" else Free(array=draw(of_rule)))

    def new(key, features_in, features_out, *, reduction, rank):
        if reduction < 1 or (rank is not None and rank < 1):
            raise ValueError(f"A reduction and a rank are at least 1, not {reduction=}, {rank=}.")
        features, width = features_out, features_out // reduction
        keys = jax.random.split(key, 5)
        down_left, down_right = _factors(keys[0], keys[1], terms, features // terms, width // terms, rank)
        up_left, up_right = _factors(keys[2], keys[3], terms, width // terms, features // terms, rank)
        return Compacter(
            rule=refs.get("compacter_rule", draw(keys[4])),
            down_left=down_left,
            down_right=down_right,
            down_bias=jnp.zeros(width),
            up_left=up_left,
            up_right=up_right,
            up_bias=jnp.zeros(features),
        )

    modules = PLACEMENTS[placement] if targets is None else targets
    params = attach(
        params, new, name="compacter", targets=modules, sites=sites, key=key, reduction=reduction, rank=rank
    )
    _check_divides(params)
    return params


def _factors(of_left, of_right, terms, rows, columns, rank):
    """S `(terms, rows, rank)` and T `(terms, rank, columns)`; `(terms, rows, columns)` and `None` without a rank."""
    glorot = lambda key, *size: jax.random.uniform(key, (terms, *size), minval=-1.0) * (12 / max(sum(size), 1)) ** 0.5
    if rank is None:
        return glorot(of_left, rows, columns), None
    return glorot(of_left, rows, rank), glorot(of_right, rank, columns)


def _check_divides(params: Params) -> None:
    nodes = nodes_of(params, Compacter)
    sizes = {path: (x.up_bias.shape[-1], x.down_bias.shape[-1], x.down_left.shape[-3]) for path, x in nodes.items()}
    wrong = [
        f"  {path.rpartition('/')[0]}: {features} features, a width of {width}, {terms} terms"
        for path, (features, width, terms) in sizes.items()
        if width < terms or features % terms or width % terms
    ]
    if wrong:
        raise ValueError(
            "`terms` must divide the features of every module, and the width that `reduction` leaves of them. It does "
            "not divide these:\n" + "\n".join(wrong) + "\n"
            "Take other `terms` or another `reduction`, or leave them out of `targets`."
        )
