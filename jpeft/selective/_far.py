"""FAR, freeze and reconfigure: some outputs of feed-forward layers learn."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._kernel import OUT, STACK, fold
from .._lazy import read
from .._node import Branch, Frozen, Reparam, Static, Trainable, value, whole, widened
from .._shared import resolve
from .._targets import Option, Sites, Targets, kernels, named_leaves, options, sibling
from .._tree import Params, put, shared_arrays, transform
from ..places import FEED_FORWARD


class FAR(Branch):
    r"""$W'_{:j} = W_{:j} + D_{:k}$ for the columns $j = indices_k$; the others are frozen. So of a bias, a row of one.

    Vucetic et al., [Efficient Fine-Tuning of BERT Models on the Edge](https://arxiv.org/abs/2205.01541), ISCAS 2022.
    """

    columns: Trainable[jax.Array, "in columns"]  # D: how the columns have changed
    indices: Frozen[jax.Array, "columns"]  # int32, sorted
    features: Static[int]  # out

    def weight(self, w):
        return w.at[:, self.indices].add(self.columns.astype(w.dtype), unique_indices=True, indices_are_sorted=True)

    def branch(self, x, key):
        y = x @ self.columns
        zeros = jnp.zeros((*y.shape[:-1], self.features), y.dtype)
        return zeros.at[..., self.indices].add(y, unique_indices=True, indices_are_sorted=True)

    def split(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The layer reconfigured: what trains `(in, columns)`, what does not `(in, out - columns)`, and `order (out,)`.

        `jnp.concatenate([trains, frozen], -1)[..., order]` is the parameter, in the shape of its matrix, and the same
        of $x$ times both is $x$ times the parameter. Every array has the stacked axes first.
        """

        def one(node, w):
            trains = jnp.zeros(node.features, bool).at[node.indices].set(True)
            places = jnp.argsort(~trains, stable=True)  # those that train first, both in order
            halves = jnp.split(w[:, places], [len(node.indices)], axis=1)
            return *halves, jnp.argsort(places)

        return self.replace(base=None).each(one, fold(self.value(), self.axes))


@transform
def far(
    params: Params,
    *,
    primed: Params,
    retention: Option = 0.1,
    rewind: bool = False,
    targets: Targets = FEED_FORWARD + r"/\w+/kernel",
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Let the outputs of every targeted kernel train that a short training of all of it has changed most. See `FAR`.

    Output $j$ has changed by $\lVert W^1_{:j} - W_{:j} \rVert_1 + |b^1_j - b_j|$. Where a kernel has a bias beside it,
    the same outputs of both train.

    **Arguments:**

    - `primed`: the tree after that training, such as of `jpeft.delta(params)`, with its nodes or merged.
    - `retention`: the share of a kernel's outputs that train, at least one; a number, or a mapping from patterns to
      numbers.
    - `rewind`: whether they start as they are in `params`, and not as they are in `primed`.
    - `targets`, `sites`: which kernels. By default those of feed-forward blocks, found by their usual names.
    - `key`: not used.

    **Raises** `ValueError` for a retention outside `(0, 1]`, for a kernel with a bias whose stacked axes are not first,
    with every path for parameters that `primed` lacks or has in other shapes, and for targets as `wrap` does.
    """
    axes = kernels(params, targets, sites)
    shares = options({"retention": retention}, list(axes))
    before, after = (named_leaves(resolve(tree, shared_arrays(tree))) for tree in (params, primed))
    layers = {name: {name: letters} | _bias(name, letters, before) for name, letters in axes.items()}
    _check(before, after, [n for parts in layers.values() for n in parts])

    new = {}
    for name, parts in layers.items():
        change = {n: fold(_exact(after[n]) - _exact(before[n]), letters) for n, letters in parts.items()}
        indices = _most_changed(change.values(), shares[name]["retention"])
        for n, letters in parts.items():
            columns = jnp.take_along_axis(change[n], indices[..., None, :], axis=-1)
            columns = jnp.zeros_like(columns) if rewind else columns
            node = FAR(axes=letters, columns=columns, indices=indices, features=change[n].shape[-1])
            new[n] = lambda x, node=node: node.replace(base=x)
    return put(params, new, over_nodes=True)


def _bias(kernel: str, axes: str, leaves: Mapping[str, Any]) -> dict[str, str]:
    """The letters of the bias beside a kernel, if there is one: all but the stacked axes, its first, are outputs."""
    name = sibling(kernel, "bias")
    if name not in leaves:
        return {}
    depth = axes.count(STACK)
    if STACK in axes[depth:]:
        raise ValueError(
            f"Which axes of {name!r} are stacked? Those of {kernel!r}, {axes!r}, do not come first: leave it out of "
            "`targets`."
        )
    return {name: STACK * depth + OUT * (len(whole(leaves[name]).shape) - depth)}


def _check(before: Mapping[str, Any], after: Mapping[str, Any], names: Iterable[str]) -> None:
    faults = [f"  {n}: missing" for n in names if n not in after]
    shapes = {n: (whole(before[n]).shape, whole(after[n]).shape) for n in names if n in after}
    faults += [f"  {n}: {then}, and not {now}" for n, (now, then) in shapes.items() if now != then]
    if faults:
        raise ValueError("`primed` is what has become of `params` in some steps of training:\n" + "\n".join(faults))


def _exact(x: Any) -> jax.Array:
    """What a parameter is, in float32 at least: its change may be too small for the parameter's own dtype."""
    x = read(x)
    return x.exact() if isinstance(x, Reparam) else widened(value(x))


def _most_changed(changes: Iterable[jax.Array], share: float) -> jax.Array:
    """The outputs, in order, that have changed most: of arrays `(stack..., in, out)`, `(stack..., count)`."""
    if not 0 < share <= 1:
        raise ValueError(f"A retention is in (0, 1], not {share}.")
    importance = sum(jnp.sum(jnp.abs(x), axis=-2) for x in changes)
    count = max(1, round(share * importance.shape[-1]))
    return jnp.sort(jax.lax.top_k(importance, count)[1])
