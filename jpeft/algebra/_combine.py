"""Several trees into one: path by path, and matrix by matrix."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .._kernel import STACK
from .._node import Reparam, whole
from .._targets import Option, options
from .._tree import Params, default, replaced
from ..reparam._lora import LoRA
from ._changes import all_factors, change, factored
from ._matched import matched
from ._part import Part, part, part_of_product
from ._rule import Rule


SUM = Rule()


class Combined(NamedTuple):
    r"""A tree with the nodes that several became, and what that has cost.

    **Fields:**

    - `params`: the tree: the common base, with a `LoRA` of scale 1 or a `Delta` at every path.
    - `ranks`: by path, the rank of a `LoRA`; `None` for a `Delta`, which has every entry.
    - `errors`: by path, $\lVert D - A B \rVert / \lVert D \rVert$ in Frobenius norms, over all matrices of a stack. $D$
      is what the change would be without a limit to its rank: 0.0 where there was none.
    """

    params: Params
    ranks: dict[str, int | None]
    errors: dict[str, float]


def combine(
    trees: Sequence[Params],
    weights: Sequence[float] | jax.Array | None,
    *,
    rule: Rule = SUM,
    rank: Option = None,
    key: jax.Array | None = None,
    fault: Callable[[Reparam], str | None] = lambda node: None,
) -> Combined:
    """One tree of many, by a rule. Of all dense changes those of one path are in memory, and one matrix's of a stack.

    `fault` may say of a node why it cannot take part. **Raises** `ValueError` as `matched` does, for other weights than
    one a tree, for ranks below one, and for patterns in `rank` that match nothing.
    """
    base, found = matched(trees, fault)
    weights = jnp.ones(len(trees)) if weights is None else jnp.asarray(weights, float)
    if weights.shape != (len(trees),):
        raise ValueError(f"There are {len(trees)} trees, and `weights` of the shape {weights.shape}: one for each.")
    ranks = {path: chosen["rank"] for path, chosen in options({"rank": rank}, list(found)).items()}
    if low := {path: r for path, r in ranks.items() if r is not None and r < 1}:
        raise ValueError(f"A rank is at least 1: {low}.")
    nodes, errors = {}, {}
    for (path, of), k in zip(found.items(), jax.random.split(default(key), len(found)), strict=True):
        chosen = weights[jnp.array(list(of))]
        node, error = _of_one_path(list(of.values()), chosen, k, rule=rule, rank=ranks[path])
        nodes[path], errors[path] = node, 0.0 if error is None else float(error)
    params = replaced(base, {path: lambda x, n=node: n.replace(base=x) for path, node in nodes.items()}, True)
    found_ranks = {path: node.a.shape[-1] if isinstance(node, LoRA) else None for path, node in nodes.items()}
    return Combined(params, found_ranks, errors)


@functools.partial(jax.jit, static_argnames=("rule", "rank"))
def _of_one_path(
    nodes: list[Reparam], weights: jax.Array, key: jax.Array, *, rule: Rule, rank: int | None
) -> tuple[Reparam, jax.Array | None]:
    """The node without its base that several become, and its error unless it has none."""

    def one(nodes, key):
        if rule.linear and all(map(factored, nodes)):
            left, right = zip(*map(all_factors, nodes), strict=True)
            right = [w.astype(r.dtype) * r for w, r in zip(weights, right, strict=True)]
            return part_of_product(jnp.concatenate(left, axis=1), jnp.concatenate(right), rank)
        return part(rule(jnp.stack([change(node) for node in nodes]), weights, key), rank)

    node, lost, total = _one_by_one(one, nodes, key)
    error = None if lost is None else jnp.sqrt(lost.sum() / jnp.where(total.sum() > 0, total.sum(), 1))
    return node.replace(axes=nodes[0].axes), error


def _one_by_one(fn: Callable[[list[Reparam], jax.Array], Part], nodes: list[Reparam], key: jax.Array) -> Part:
    """`fn(nodes, key)` of the nodes of every matrix in turn, with the stacked axes first in the result."""
    if STACK not in nodes[0].axes:
        return fn(nodes, key)
    axis = nodes[0].axes.index(STACK)

    def at(n):
        cut = lambda x, axis: jax.lax.dynamic_index_in_dim(x, n, axis, keepdims=False)
        return _one_by_one(fn, [node.take(cut, axis, drop=True) for node in nodes], jax.random.fold_in(key, n))

    return jax.lax.map(at, jnp.arange(whole(nodes[0]).shape[axis]))
