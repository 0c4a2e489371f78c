"""Adapters that were tuned one by one, in one tree over one base."""

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._checksum import same
from .._expressions import Stacked, directed
from .._kernel import STACK
from .._merge import beside
from .._node import Additive, Affine, Branch, Leaf, Matrix, Node, Reparam, Role
from .._shared import refs
from .._still import Still, thawed
from .._targets import named_leaves
from .._tree import Params, modules, nodes_of, place, replaced, strip
from ..additive._hidden import Hidden
from ._stacked import StackedAffine, StackedBeside, StackedBranches, StackedHidden


Chain = tuple[Node, ...]  # the nodes of one adapter at one place, the innermost first
Kept = dict[Any, Chain]  # by place


def stack(adapters: Sequence[Params] | Mapping[str, Params], *, freeze: bool = False) -> Params:
    """One tree of several that were tuned on one base: calls say which adapter acts, also for each row.

    `jpeft.apply(model, variables, ids, adapters=jnp.array([0, 2, 2, 1]))`. There is one base. Adapters of one method
    are computed together, whatever their ranks are: a row costs as much as it does with that of the largest rank.

    **Arguments:**

    - `adapters`: the trees; or a mapping from names to trees: otherwise their names are their numbers.
    - `freeze`: whether nothing of them trains any more, for what is to train around them.

    **Raises** `ValueError` for trees over different bases; and, with every path and the reason, for nodes that do not
    act on activations by themselves, such as those of `dora`, prompts, or parameters that train.
    """
    trees = dict(adapters) if isinstance(adapters, Mapping) else {str(n): tree for n, tree in enumerate(adapters)}
    if not trees:
        raise ValueError("There are no adapters to stack.")
    bases = {name: strip(tree) for name, tree in trees.items()}
    params = next(iter(bases.values()))
    for name, base in bases.items():
        _check_same(params, base, name)
    found = {name: _parts(tree) for name, tree in trees.items()}
    if faults := [f"  {name}: {fault}" for name, (*_, stuck) in found.items() for fault in stuck]:
        raise ValueError("These cannot be stacked:\n" + "\n".join(faults))
    names, (branches, nodes, _) = tuple(trees), zip(*found.values(), strict=True)
    new = {}
    for (path, axes), chains in _by_place(branches).items():
        groups = _grouped(chains, axes.count(STACK), freeze)
        new[path] = lambda base, how=groups, axes=axes: StackedBranches(base=base, axes=axes, names=names, **how)
    params = replaced(params, new, over_nodes=True)
    for (path, kind, _), chains in sorted(_by_place(nodes).items(), key=lambda item: item[0][2]):  # later ones outside
        sizes = _stack_of(next(iter(chains.values()))[0])
        new = kind(names=names, stack=sizes, **_grouped(chains, len(sizes), freeze))
        params = place(params, {path: new}, "stack")
    return params


def activate(params: Params, adapters: Any) -> Params:
    """The tree of a `stack` with a choice made, for `merge`, and for calls without `adapters`, as in `generate`.

    **Arguments:**

    - `adapters`: as `jpeft.apply` takes it, but for expressions that divide rows or tokens.

    **Raises** `ValueError` for a tree without a stack, and for adapters that there are not.
    """
    return directed(params, adapters)


def unstack(params: Params) -> dict[str, Params]:
    """The adapters of a `stack`, by name: to the same effect as before, ranks filled up and scales in the factors."""
    stacks = {**nodes_of(params, StackedBranches), **nodes_of(params, StackedBeside)}
    if not stacks:
        raise ValueError("There is no stack of adapters in this tree: `jpeft.stack` makes one.")
    names = next(iter(stacks.values())).names
    return {name: _one(params, number) for number, name in enumerate(names)}


def _one(params: Params, number: int) -> Params:
    tree = strip(params)
    for name, x in named_leaves(params).items():
        while isinstance(x, Reparam) and not isinstance(x, StackedBranches):
            x = x.base
        if isinstance(x, StackedBranches):
            nodes = _member(x, number, x.depth)

            def over(base, nodes=nodes, axes=x.axes):
                for node in nodes:
                    base = node.replace(base=base, axes=axes)
                return base

            tree = replaced(tree, {name: over}, over_nodes=True)
    for path, own in modules(params).items():
        for _, x in beside(own):
            if isinstance(x, StackedBeside):
                for node in _member(x, number, len(x.stack)):
                    tree = place(tree, {path: node}, type(node).__name__.lower())
    return tree


def _member(node: StackedBranches | StackedBeside, number: int, depth: int) -> Chain:
    for chain, numbers in zip(node.members, node.numbers, strict=True):
        if number in numbers:
            n = numbers.index(number)
            return thawed(jax.tree.map(lambda a, n=n: jnp.take(a, n, axis=depth), chain))
    return ()


def _check_same(base: Params, other: Params, name: str) -> None:
    """**Raises** `ValueError`, with every path, where two bases differ."""
    ours, theirs = named_leaves(base), named_leaves(other)
    differ = [f"  {n}" for n in ours | theirs if n not in ours or n not in theirs or not same(ours[n], theirs[n])]
    if differ:
        raise ValueError(f"The adapter {name!r} was tuned on another base. These differ:\n" + "\n".join(differ[:16]))


def _parts(tree: Params) -> tuple[Kept, Kept, list[str]]:
    """The branches by path and axes, those beside modules by path, kind and order; and what is neither."""
    branches, nodes, stuck = {}, {}, []
    for path, x in named_leaves(tree).items():
        chain, top = [], x
        while isinstance(x, Reparam):
            chain.append(x)
            x = x.base
        wrong = [n for n in chain if not isinstance(n, Branch) or isinstance(n, Stacked) or refs(n.replace(base=None))]
        wrong += [x] if isinstance(x, Leaf) and not isinstance(x, Matrix) else []
        stuck += [f"{path}: {type(n).__name__}, {_why(n)}" for n in wrong]
        if isinstance(top, Reparam) and not wrong:
            alone = top.axes.replace(STACK, "")
            branches[path, top.axes] = tuple(n.replace(base=None, axes=alone) for n in reversed(chain))
    for path, own in modules(tree).items():
        for order, (name, x) in enumerate(beside(own)):
            if (kind := _kind(x)) is not None and not refs(x):
                nodes[path, kind, order] = (x,)
            else:
                stuck.append(f"{f'{path}/{name}'.lstrip('/')}: {type(x).__name__}, {_why(x)}")
    return branches, nodes, stuck


def _kind(node: Additive) -> Callable | None:
    """What nodes of this kind are stacked in."""
    if isinstance(node, Stacked):
        return None
    if isinstance(node, Affine):
        return StackedAffine
    return _HIDDEN[node.at] if isinstance(node, Hidden) and node.at in _HIDDEN else None


_HIDDEN = {at: functools.partial(StackedHidden, at=at) for at in ("output", "input")}


def _why(node: Node) -> str:
    if isinstance(node, Stacked):
        return "which is a stack: take it apart by `jpeft.unstack`"
    if refs(node):
        return "which shares arrays with other nodes"
    return "which does not add something that it alone makes of activations"


def _by_place(found: Sequence[Kept]) -> dict[Any, dict[int, Chain]]:
    """By place, the chains of the adapters that have one there, by number."""
    places = defaultdict(dict)
    for number, kept in enumerate(found):
        for at, chain in kept.items():
            places[at][number] = chain
    return places


def _grouped(chains: Mapping[int, Chain], depth: int, freeze: bool) -> dict[str, Any]:
    """The fields `members` and `numbers`: chains of one structure in one, with an axis of adapters behind `depth`."""
    sizes = defaultdict(dict)
    for chain in chains.values():
        for n, node in enumerate(chain):
            have = sizes[n, type(node)]
            have |= {dim: max(size, have.get(dim, 0)) for dim, size in _sizes(node).items()}
    alike = lambda chain: tuple(_alike(node, sizes[n, type(node)]) for n, node in enumerate(chain))
    groups = defaultdict(dict)
    for number, chain in chains.items():
        arrays, structure = jax.tree.flatten(alike(chain))
        groups[structure, tuple((x.shape, x.dtype) for x in arrays)][number] = arrays
    join = lambda group: [jnp.stack(xs, axis=depth) for xs in zip(*group.values(), strict=True)]
    members = tuple(jax.tree.unflatten(structure, join(group)) for (structure, _), group in groups.items())
    if freeze:
        members = tuple(tuple(map(Still.of, chain)) for chain in members)
    return {"members": members, "numbers": tuple(tuple(group) for group in groups.values())}


def _sizes(node: Node) -> dict[str, int]:
    """Of the axes that zeros may lengthen, how long they are."""
    named = ((dims, getattr(node, name)) for name, dims in node.dims.items() if dims)
    return {dim: x.shape[n - len(dims)] for dims, x in named for n, dim in enumerate(dims) if dim in node.grows}


def _alike(node: Node, sizes: Mapping[str, int]) -> Node:
    """The node with longer axes, and its scale in its arrays: to the same effect."""

    def longer(x, dims):
        more = [sizes.get(dim, n) - n for n, dim in zip(x.shape[-len(dims) :], dims, strict=True)]
        return jnp.pad(x, [(0, 0)] * (x.ndim - len(dims)) + [(0, n) for n in more])

    changes = {name: longer(getattr(node, name), node.dims[name]) for name in node.parts(Role.TRAINABLE, Role.FROZEN)
               if node.dims[name] and node.grows}  # fmt: skip
    if node.scaled_by:
        changes |= {name: node.scale * changes.get(name, getattr(node, name)) for name in node.scaled_by}
        changes["scale"] = 1.0
    return node.replace(**changes)


def _stack_of(node: Additive) -> tuple[int, ...]:
    """The sizes of the axes over which a node's module is stacked."""
    name, dims = next((name, dims) for name, dims in node.dims.items() if dims)
    x = getattr(node, name)
    return x.shape[: x.ndim - len(dims)]
