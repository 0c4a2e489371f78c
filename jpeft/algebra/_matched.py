"""Trees that were tuned on one base: what stands where, and that it is one base."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from .._checksum import same
from .._node import Additive, Leaf, Matrix, Reparam, value
from .._shared import resolve
from .._targets import named_leaves
from .._tree import Params, nodes_of, shared_arrays, strip
from ._changes import chain, factored


class Matched(NamedTuple):
    """The base of some trees, and by path the nodes that stand there, by the number of their tree."""

    base: Params
    nodes: dict[str, dict[int, Reparam]]


def matched(trees: Sequence[Params], fault: Callable[[Reparam], str | None] = lambda node: None) -> Matched:
    """The trees, side by side. `fault` may say of a node why it cannot take part.

    **Raises** `ValueError`, with every path and reason, for nodes beside modules and for those that have taken the
    place of their base, which are no changes of weights; for trees of different parameters, bases, or letters of axes;
    and for trees without nodes.
    """
    if isinstance(trees, Mapping) or not trees:
        raise ValueError("The trees are a sequence of at least one: `[a, b]`.")
    leaves = [_leaves(tree) for tree in trees]
    places = {name: [of.get(name) for of in leaves] for name in dict.fromkeys(name for of in leaves for name in of)}
    faults = [
        f"{path} of trees[{n}]: {type(x).__name__} acts on activations, and changes no weights. Take it out."
        for n, tree in enumerate(trees)
        for path, x in nodes_of(tree, Additive, nested=False).items()
    ]
    faults += [f"{name}{text}" for name, found in places.items() for text in _faults(found, fault)]
    if faults:
        raise ValueError("These trees cannot be combined:\n" + "\n".join(f"  {text}" for text in faults))
    nodes = {name: {n: x for n, x in enumerate(found) if isinstance(x, Reparam)} for name, found in places.items()}
    if not any(nodes.values()):
        raise ValueError("These trees have no nodes: apply a method first, such as `jpeft.lora(params)`.")
    return Matched(strip(trees[0]), {name: found for name, found in nodes.items() if found})


def _leaves(tree: Params) -> dict[str, Any]:
    """Every parameter by name, with shared arrays in their places."""
    shared = shared_arrays(tree)
    return {name: resolve(x, shared) if isinstance(x, Leaf) else x for name, x in named_leaves(tree).items()}


def _faults(found: list[Any], fault: Callable[[Reparam], str | None]) -> Iterator[str]:
    """What is wrong with what stands at one path of every tree."""
    chains = [chain(x) for x in found]
    bases = {n: base for n, (*_, base) in enumerate(chains) if base is not None and not _lost(base)}
    first = next(iter(bases), None)
    for n, (*nodes, base) in enumerate(chains):
        if base is None:
            yield f": trees[{n}] has no such parameter."
        elif _lost(base):
            yield (
                f" of trees[{n}]: {type(base).__name__} has taken the place of its base, and what it changes is not "
                "known. Train such a parameter by `jpeft.delta`."
            )
        elif not same(bases[first], base):
            yield f" of trees[{n}]: its base is not that of trees[{first}]. Tune all adapters on one base."
        elif nodes and (text := fault(found[n]) or _not_one_change(found[n])):
            yield f" of trees[{n}]: {text}"
    letters = dict.fromkeys(x.axes for one in chains for x in one if isinstance(x, Matrix))
    if len(letters) > 1:
        yield f": its axes are {' and '.join(letters)} to its nodes. Give all transforms the same `sites`."


def _lost(base: Any) -> bool:
    """Whether a base is one no more: something that trains is in its place."""
    return isinstance(base, Leaf) and not isinstance(base, Matrix)


def _not_one_change(node: Reparam) -> str | None:
    """Why a node has no value, if it has none."""
    if factored(node):
        return None
    try:
        jax.eval_shape(value, node)
    except ValueError as e:
        return str(e)
