"""SparseAdapter: adapters that are pruned before they train."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from .._kernel import stacked
from .._node import Node
from .._targets import Targets, name_of, one_of, select
from .._tree import Params, combine, default, nodes_of, partition
from ..selective._masks import Scope, largest
from ._hidden import Hidden


Score = Literal["magnitude", "random", "snip", "grasp", "synflow"]


def sparse_adapter(
    params: Params,
    *,
    density: float = 0.5,
    score: Score = "magnitude",
    scope: Scope = "all",
    loss_fn: Callable[[Params, Any], jax.Array] | None = None,
    batches: Iterable[Any] = (),
    targets: Targets | None = None,
    key: jax.Array | None = None,
) -> tuple[Params, dict[str, np.ndarray]]:
    r"""Set entries of matrices that train to zero before they do: `(params, mask)`.

    `jpeft.optim.masked_updates(tx, mask)` keeps them there. The mask has an array for every pruned matrix, and `True`
    for what else trains, by name. The trainable part may be that of any method.

    **Arguments:**

    - `density`: the share of the entries that stay: of $N$ exactly $\lfloor density \cdot N \rfloor$, those of the
      largest scores.
    - `score`: of the entries $w$, where $L$ is the sum of the losses of the batches: `"magnitude"` $|w|$, `"random"`,
      `"snip"` $|w \odot \nabla L|$, `"grasp"` $w \odot \nabla^2 L\,\nabla L$, or `"synflow"` $|w| \odot \nabla R(|w|)$,
      where all that trains has become its absolute value, and $R$ is `loss_fn` or, if that is left out, the mean of
      what every adapter by itself makes of ones, summed over them.
    - `scope`: `"all"` is one ranking of all entries, `"each"` one of every matrix, each layer's by itself.
    - `loss_fn`, `batches`: `(params, batch)` to a number, and what it is called with.
    - `targets`: which arrays, by the names that they have in the trainable part, such as
      `layers_0/mlp/down/bottleneck/up`. By default every matrix, and no bias.
    - `key`: for random scores; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for an unknown score, a score that needs a loss or batches and has none, targets that match
    nothing, a density outside `(0, 1]`, and, with every name, for matrices whose scores are all zero, as they are
    where the other matrix of a bottleneck starts at zero.

    He et al., [SparseAdapter: An Easy Approach for Improving the Parameter-Efficiency of
    Adapters](https://arxiv.org/abs/2210.04284), Findings of EMNLP 2022.
    """
    one_of("score", score, get_args(Score))
    trainable, frozen = partition(params)
    own = _own_axes(trainable)
    named = {name_of(path): x for path, x in jax.tree_util.tree_leaves_with_path(trainable)}
    chosen = select([name for name, axes in own.items() if axes > 1] if targets is None else targets, named)
    made = _scores(score, trainable, frozen, loss_fn, list(batches), default(key))
    scores = {name_of(path): np.asarray(x, np.float32) for path, x in jax.tree_util.tree_leaves_with_path(made)}
    if dead := [f"  {name} {named[name].shape}" for name in chosen if not scores[name].any()]:
        raise ValueError(
            f"All scores by {score} are zero, so that nothing tells which entries should stay, in\n"
            + "\n".join(dead)
            + "\nLet all of an adapter start at random, as by `init='bert'`, rank by `score='random'`, or leave these "
            "out of `targets`."
        )
    stack = {name: named[name].shape[: named[name].ndim - own[name]] if name in own else () for name in chosen}
    masks = largest({name: scores[name].reshape(*stack[name], 1, -1) for name in chosen}, density, scope)
    kept = {name: m.reshape(named[name].shape) for name, m in zip(chosen, masks, strict=True)}
    mask = {name: kept.get(name, np.True_) for name in named}
    keep = lambda path, x: jnp.where(mask[name_of(path)], x, jnp.zeros_like(x))
    return combine(jax.tree_util.tree_map_with_path(keep, trainable), frozen), mask


def _own_axes(trainable: Params) -> dict[str, int]:
    """How many axes an array has by itself, where nothing is stacked; by name, of those whose nodes tell."""
    nodes = nodes_of(trainable, Node).items()
    fields = ((f"{path}/{name}", dims) for path, node in nodes for name, dims in node.dims.items())
    names = {name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(trainable)}
    return {name: len(dims) for name, dims in fields if dims and name in names}


def _scores(
    score: Score, trainable: Params, frozen: Params, loss_fn: Callable | None, batches: list[Any], key: jax.Array
) -> Params:
    if score == "magnitude":
        return jax.tree.map(jnp.abs, trainable)
    if score == "random":
        leaves, structure = jax.tree.flatten(trainable)
        keys = jax.random.split(key, len(leaves))
        return structure.unflatten([jax.random.uniform(k, x.shape) for k, x in zip(keys, leaves, strict=True)])
    if score == "synflow" and loss_fn is None:
        loss_fn, batches = _flow, [()]
    if loss_fn is None or not batches:
        raise ValueError(f"Scores by {score} are of a loss: give `loss_fn(params, batch)` and `batches`.")
    gradient = jax.grad(lambda trainable, frozen, batch: loss_fn(combine(trainable, frozen), batch))

    def total(fn, *args):
        fn = jax.jit(fn)
        of_batches = (fn(*args, frozen, batch) for batch in batches)
        return functools.reduce(lambda total, x: jax.tree.map(jnp.add, total, x), of_batches)

    if score == "synflow":
        sizes = jax.tree.map(jnp.abs, trainable)
        return jax.tree.map(jnp.multiply, sizes, total(gradient, sizes))
    slope = total(gradient, trainable)
    if score == "snip":
        return jax.tree.map(lambda w, g: jnp.abs(w * g), trainable, slope)

    def curved(trainable, slope, frozen, batch):
        return jax.jvp(lambda trainable: gradient(trainable, frozen, batch), (trainable,), (slope,))[1]

    return jax.tree.map(jnp.multiply, trainable, total(curved, trainable, slope))


def _flow(params: Params, _: Any) -> jax.Array:
    """What adapters make of ones, each by itself."""
    nodes = nodes_of(params, Hidden, "bottleneck")
    of_inputs = lambda node: next((name for name, dims in node.dims.items() if dims and dims[0] == "in"), None)
    first = {path: of_inputs(node) for path, node in nodes.items()}
    if untold := [f"  {path}: {type(nodes[path]).__name__}" for path, name in first.items() if name is None]:
        raise ValueError("Nothing tells how many features go into these: give `loss_fn`.\n" + "\n".join(untold))

    def one(node, x, axes):
        ones = jnp.ones((1, x.shape[-axes]), x.dtype)
        return jnp.sum(stacked(lambda node: jnp.mean(node.change(ones, None)), x.ndim - axes)(node))

    entries = ((nodes[path], name) for path, name in first.items())
    return sum(one(node, getattr(node, name), len(node.dims[name])) for node, name in entries)
