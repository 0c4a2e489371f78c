"""Provenance through a jaxpr: evaluate a function, some of whose parameters are nodes, with the nodes at work.

The function is traced with plain parameters, and its jaxpr evaluated with a `View` in place of every parameter that is
followed. Views pass through what only moves them about, and through control flow; a product with one becomes the base's
product and what the node's branch adds. Anything else takes the node's value, which is always right.
"""

import collections
from collections.abc import Callable
from typing import Any

import jax

from . import _control, _moves, _products, _shim
from ._node import Leaf, Matrix, is_param, rebox, value, whole
from ._operands import fold_in
from ._targets import Call, name_of
from ._view import View


class Record:
    """What became of every parameter that was followed."""

    def __init__(self):
        self.names: dict[str, Any] = {}
        self.ways: dict[str, set[str]] = collections.defaultdict(set)  # branched, merged
        self.ops: dict[str, dict[str, None]] = collections.defaultdict(dict)
        self.letters: dict[str, dict[int, str]] = collections.defaultdict(dict)
        self.flops: dict[str, dict[int, float]] = collections.defaultdict(dict)
        self.modules: dict[str, Call] = {}
        self.trips = 1  # of the loops around the present equation

    def note(self, name: str, way: str) -> None:
        self.ways[name].add(way)

    def axis(self, view: View, d: int, letter: str) -> None:
        """Dimension `d` of a view is an input (`i`), an output (`o`) or stacked (`s`)."""
        for t in view.layout.dims[d]:
            self.letters[view.name].setdefault(view.origin[view.layout.axis[t]], letter)

    def product(self, eqn: Any, product: _products.Product) -> None:
        self.ops[product.view.name][product.name] = None
        self.flops[product.view.name][id(eqn)] = product.flops * self.trips
        for d, letter in product.letters.items():
            self.axis(product.view, d, letter)

    def way(self, name: str) -> str:
        """`branched`, `merged` or `unused`."""
        return "merged" if "merged" in self.ways[name] else "branched" if self.ways[name] else "unused"


def evaluate(fn: Callable, params: Any, follow: Callable[[str, Any], bool], key: Any, record: Record) -> Any:
    """`fn(params)`, with every parameter that `follow(name, leaf)` picks followed through it.

    `fn` is called once, with plain parameters in place of every `Leaf`.
    """
    paths, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_param)
    plain, inputs, axes = [], [], []
    for path, leaf in paths:
        name = name_of(path)
        followed = follow(name, leaf) and bool(jax.tree.leaves(leaf))  # of a node without arrays nothing can be seen
        if followed:
            record.names[name] = leaf
        formula = isinstance(leaf, Leaf)
        plain.append(rebox(leaf, whole(leaf)) if formula else leaf)
        axes.append(_shim.varying(leaf))
        for x in [leaf if isinstance(leaf, Matrix) else value(leaf)] if formula else jax.tree.leaves(leaf):
            inputs.append(View.of(name, x) if followed else value(x))

    static: dict[str, Any] = {}

    def flat(plain):
        params = jax.tree.unflatten(tree, map(_shim.vary, plain, axes))
        out, static["tree"] = jax.tree.flatten(fn(params))
        static["fixed"] = [None if hasattr(x, "dtype") else x for x in out]
        return [x for x in out if hasattr(x, "dtype")]

    closed = jax.make_jaxpr(flat)(plain)
    engine = _Engine(record)
    outs = iter(engine.formed(engine.run(closed.jaxpr, closed.consts, inputs, key)))
    return jax.tree.unflatten(static["tree"], [next(outs) if x is None else x for x in static["fixed"]])


class _Engine:
    """Evaluates jaxprs with views among their inputs."""

    def __init__(self, record: Record):
        self.record = record

    def run(self, jaxpr: Any, consts: Any, args: list[Any], key: Any) -> list[Any]:
        """The outputs of a jaxpr, views among them where they are its inputs. Every equation has a key of its own."""
        env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
        read = lambda v: v.val if isinstance(v, _shim.Literal) else env[v]
        for n, eqn in enumerate(jaxpr.eqns):
            vals = [read(v) for v in eqn.invars]
            viewed = any(isinstance(v, View) for v in vals)
            outs = self.equation(eqn, vals, fold_in(key, n)) if viewed else _shim.bind(eqn, vals)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def formed(self, xs: list[Any], op: str | None = None) -> list[Any]:
        """The values of views, and arrays as they are; `op` is the operation that consumes them."""
        for x in xs:
            if isinstance(x, View):
                self.record.note(x.name, "merged" if isinstance(x.node, Leaf) else "branched")
                self.record.ops[x.name] |= {op: None} if op else {}
        return [x.value() if isinstance(x, View) else x for x in xs]

    def equation(self, eqn: Any, vals: list[Any], key: Any) -> list[Any]:
        """The outputs of an equation that has a view among its inputs."""
        name, outs = eqn.primitive.name, None
        if name in _moves.RULES:
            outs = _moves.RULES[name](self, eqn, vals)
        elif name in _control.RULES:
            outs = _control.RULES[name](self, eqn, vals, key)
        elif name in _products.RULES:
            outs = self.product(eqn, vals, key)
        return _shim.bind(eqn, self.formed(vals, name)) if outs is None else outs

    def product(self, eqn: Any, vals: list[Any], key: Any) -> list[Any] | None:
        product = _products.RULES[eqn.primitive.name](eqn, vals)
        if product is None:
            return None
        self.record.product(eqn, product)
        return [_products.compute(product, eqn, vals, key, self.record.note)]
