"""Adapters side by side, in one place of a model."""

from typing import Any

import jax
import jax.numpy as jnp

from .._expressions import Stacked
from .._node import Additive, Branch, Frozen, Leaf, Static, is_node
from .._operands import fold_in
from .._routes import Members, Route
from .._shared import Shared, unshare
from .._still import is_still, thawed
from ..additive._hidden import Hidden


class StackedBranches(Branch, Stacked):
    r"""$W' = W + \sum_n g_n\,(W_n - W)$, where the call says what the gates $g_n$ of its rows and tokens are."""

    members: Frozen[Any]  # of every group a chain of nodes without a base, whose arrays have an axis of adapters
    numbers: Static[tuple[tuple[int, ...], ...]]  # of every group, which adapters they are
    names: Static[tuple[str, ...]]  # of all adapters of the stack
    route: Frozen[Any] = None  # of a call: shared arrays

    def on(self, route):
        return self.replace(route=jax.tree.map(Shared, route))

    def drawn(self, key):
        leaves, tree = jax.tree.flatten(self.members, is_leaf=is_node)
        drawn = [x.drawn(fold_in(key, 1 + n)) if isinstance(x, Leaf) else x for n, x in enumerate(leaves)]
        return super().drawn(fold_in(key, 0)).replace(members=tree.unflatten(drawn))

    def branch(self, x, key):
        def chain(nodes, x, key):
            first, *others = (node.branch(x, fold_in(key, n)) for n, node in enumerate(nodes))
            return sum(others, start=first)

        return _routed(self, chain, x, key)

    def weight(self, w):
        uniform = all(a.ndim == 3 and a.shape[:2] == (1, 1) for a in jax.tree.leaves(unshare(self.route)))
        if self.route is not None and not uniform:
            raise ValueError("Adapters that differ by row or token make no one kernel: they act on activations alone.")

        def change(nodes, w, key):
            new = w
            for node in nodes:
                new = node.weight(new)
            return new - w

        return w + _routed(self, change, w, None)


class StackedBeside(Additive, Stacked):
    """Nodes beside one module, side by side."""

    members: Frozen[Any]  # of every group one node in a tuple, whose arrays have an axis of adapters
    numbers: Static[tuple[tuple[int, ...], ...]]
    names: Static[tuple[str, ...]]
    stack: Static[tuple[int, ...]] = ()  # the sizes of the stacked axes, which all arrays have first
    route: Frozen[Any] = None

    def on(self, route):
        return self.replace(route=jax.tree.map(lambda a: jnp.broadcast_to(a, (*self.stack, *a.shape)), route))


class StackedHidden(StackedBeside, Hidden):
    r"""$f = \sum_n g_n f_n$ of `Hidden` nodes, where the call says what the gates $g_n$ of its rows and tokens are."""

    @property
    def random(self):
        return any(not is_still(node) and node.random for group in self.members for node in group)

    def within(self, dtype):
        return self  # each of its nodes by itself

    def change(self, h, key):
        term = lambda nodes, h, key: nodes[0].within(h.dtype).change(h, key)
        return _routed(self, term, h, key, moves=self.at == "output")


class StackedAffine(StackedBeside):
    r"""$x' = x + \sum_n g_n\,(x_n - x)$ of `Affine` nodes that make $x_n$ of what goes in; so of what comes out."""

    def inputs(self, x, *args):
        return x + _routed(self, lambda nodes, x, key: nodes[0].inputs(x)[0] - x, x, None, moves=True), *args

    def output(self, y, *args):
        return y + _routed(self, lambda nodes, y, key: nodes[0].output(y) - y, y, None, moves=True)


def _routed(node: StackedBranches | StackedBeside, term: Any, x: Any, key: Any, moves: bool = False) -> jax.Array:
    """What the route of a node makes of `term(member, x, key)`; zeros where none of the adapters that act is here."""
    route: Route = unshare(node.route)
    if route is None:
        raise ValueError(
            f"Which adapters? There is a stack of them: {', '.join(node.names)}. Call the model by `jpeft.apply(..., "
            "adapters=)`, with a name, a number for every row, weights or an expression; or `jpeft.activate` some."
        )
    here = _Here(node, term, key, moves)
    y = route(here, x)
    return jax.tree.map(jnp.zeros_like, here.one(node.numbers[0][0], x)) if y is None else y


class _Here(Members):
    def __init__(self, node, term, key, moves):
        keys = [None if any(map(is_still, group)) else key for group in node.members]  # nothing drops in what is frozen
        self.groups = list(zip(thawed(node.members), node.numbers, keys, strict=True))
        self.count, self.term, self.moves = len(node.names), term, moves
        self.linear = isinstance(node, StackedBranches)
        self.depth = node.depth if self.linear else 0  # experts, whose tokens are sorted

    def one(self, number, x):
        for group, numbers, key in self.groups:
            if number in numbers:
                return self.term(self.member(group, numbers.index(number)), x, fold_in(key, number))
        return None

    def member(self, group, n):
        return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, n, self.depth, keepdims=False), group)

    def by_row(self, ids, x):
        shape = x.shape[-1:] if self.linear else x.shape[1:]  # each row is a batch of its own
        rows = x.reshape(len(ids), -1, *shape)
        total = None
        for group, numbers, key in self.groups:
            held = jnp.full(self.count + 1, -1).at[jnp.array(numbers)].set(jnp.arange(len(numbers)))  # the last: none
            here = held[jnp.where(ids < 0, self.count, ids)]
            one = lambda n, x, k, group=group: self.term(self.member(group, jnp.maximum(n, 0)), x, k)
            y = jax.vmap(one)(here, rows, None if key is None else jax.random.split(key, len(ids)))
            along = lambda a, ndim=y.ndim: a.reshape(-1, *[1] * (ndim - 1))
            y = jnp.where(along(here >= 0), y, along(jnp.where(ids < self.count, 0, jnp.nan)).astype(y.dtype))
            total = y if total is None else total + y
        return total.reshape(*x.shape[: x.ndim - len(shape)], *total.shape[2:])
