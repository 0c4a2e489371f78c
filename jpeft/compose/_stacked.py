"""Adapters side by side, in one place of a model."""

from typing import Any

import jax
import jax.numpy as jnp

from .._expressions import Stacked
from .._node import Additive, Branch, Frozen, Static
from .._operands import Operand
from .._routes import Members, Route, Weighted, every
from .._shared import Shared, unshare
from .._still import thawed
from ..additive._hidden import Hidden


class StackedBranches(Branch, Stacked):
    r"""$W' = W + \sum_n g_n\,(W_n - W)$, where the call says what the gates $g_n$ of its rows and tokens are."""

    members: Frozen[Any]  # of every group a chain of nodes without a base, whose arrays have an axis of adapters
    numbers: Static[tuple[tuple[int, ...], ...]]  # of every group, which adapters they are
    names: Static[tuple[str, ...]]  # of all adapters of the stack
    route: Frozen[Any] = None  # of a call: shared arrays

    def on(self, route):
        return self.replace(route=jax.tree.map(Shared, route))

    def branch(self, x, key):
        chain = lambda nodes, x: sum((node.branch(x, None) for node in nodes[1:]), start=nodes[0].branch(x, None))
        return _routed(self, chain, x)

    def weight(self, w):
        uniform = all(a.ndim == 3 and a.shape[:2] == (1, 1) for a in jax.tree.leaves(unshare(self.route)))
        if self.route is not None and not uniform:
            raise ValueError("Adapters that differ by row or token make no one kernel: they act on activations alone.")

        def change(nodes, w):
            new = w
            for node in nodes:
                new = node.weight(new)
            return new - w

        return w + _routed(self, change, w)


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

    def change(self, h, key):
        return _routed(self, lambda nodes, h: nodes[0].change(h, None), h, moves=self.at == "output")


class StackedAffine(StackedBeside):
    r"""$x' = x + \sum_n g_n\,(x_n - x)$ of `Affine` nodes that make $x_n$ of what goes in; so of what comes out."""

    def inputs(self, x, *args):
        return x + _routed(self, lambda nodes, x: nodes[0].inputs(x)[0] - x, x, moves=True), *args

    def output(self, y, *args):
        return y + _routed(self, lambda nodes, y: nodes[0].output(y) - y, y, moves=True)


def _routed(node: StackedBranches | StackedBeside, term: Any, x: Any, moves: bool = False) -> jax.Array:
    """What the route of a node makes of `term(member, x)`; zeros where none of the adapters that act is here."""
    route: Route = unshare(node.route)
    if route is None:
        raise ValueError(
            f"Which adapters? There is a stack of them: {', '.join(node.names)}. Call the model by `jpeft.apply(..., "
            "adapters=)`, with a name, a number for every row, weights or an expression; or `jpeft.activate` some."
        )
    y = route(_Here(node, term, moves), x)
    if y is None:
        first = jax.tree.map(lambda a: a[0], thawed(node.members[0]))
        y = jax.tree.map(jnp.zeros_like, term(first, x))
    return y


class _Here(Members):
    def __init__(self, node, term, moves):
        self.groups = list(zip(thawed(node.members), node.numbers, strict=True))
        self.count, self.term, self.moves = len(node.names), term, moves

    def one(self, number, x):
        for group, numbers in self.groups:
            if number in numbers:
                n = numbers.index(number)
                return self.term(jax.tree.map(lambda a, n=n: a[n], group), x)
        return None

    def by_row(self, ids, x):
        if isinstance(x, Operand):  # what is looked up or convolved has no rows before the product
            gates = jax.nn.one_hot(ids, self.count)[:, None]
            return Weighted(gates, every(self.count))(self, x)
        rows = x.reshape(len(ids), -1, x.shape[-1])
        total = None
        for group, numbers in self.groups:
            held = jnp.full(self.count + 1, -1).at[jnp.array(numbers)].set(jnp.arange(len(numbers)))  # the last: none
            here = held[jnp.where(ids < 0, self.count, ids)]
            one = lambda n, x, group=group: self.term(jax.tree.map(lambda a: a[jnp.maximum(n, 0)], group), x)
            y = jax.vmap(one)(here, rows)
            y = jnp.where((here >= 0)[:, None, None], y, jnp.zeros_like(y))
            total = y if total is None else total + y
        return total.reshape(*x.shape[:-1], -1)
