"""Control flow and other operations that hold a jaxpr: evaluate it with the views that go into it.

A rule takes the engine, the equation, its inputs with a `View` among them, and a key (or `None`). What leaves a
computation, or is carried around a loop, is an array. A loop's iterations draw different keys.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from . import _shim
from ._kernel import IN, OUT, STACK
from ._node import Branch, Leaf, Node, Reparam, Role, value
from ._operands import fold_in
from ._shared import is_shared
from ._view import View


def _call(engine, eqn, vals, key):
    inner = eqn.params["call_jaxpr" if eqn.primitive.name == "closed_call" else "jaxpr"]
    return engine.run(inner.jaxpr, inner.consts, vals, key)


def _remat(engine, eqn, vals, key):
    run = lambda key, *vals: engine.formed(engine.run(eqn.params["jaxpr"], (), list(vals), key))
    return jax.checkpoint(run, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])(key, *vals)


def _thread(engine, x):
    """What a scan slices for `x`, and how `x` is made again of a slice. A view gives up its first dimension."""
    if not isinstance(x, View):
        return x, lambda x: x
    engine.record.axis(x, 0, "s")
    view = x.part(lambda a, k: jnp.moveaxis(a, k, 0), 0, None)
    if view is None:
        return engine.formed([x])[0], lambda x: x
    leaves, tree = jax.tree.flatten(view.replace(gain=None), is_leaf=is_shared)

    def rebuild(moving):
        moving = iter(moving)
        return tree.unflatten([a if is_shared(a) else next(moving) for a in leaves]).replace(gain=view.gain)

    return [a for a in leaves if not is_shared(a)], rebuild


def _scan(engine, eqn, vals, key):
    p = eqn.params
    consts, states = _shim.scan_counts(p)
    carried = consts + states
    moving, rebuild = zip(*(_thread(engine, x) for x in vals[carried:]), strict=True) if vals[carried:] else ((), ())
    keys = None if key is None else jax.random.split(key, p["length"])

    def body(carry, xs):
        xs, key = xs
        xs = [make(x) for make, x in zip(rebuild, xs, strict=True)]
        outs = engine.formed(engine.run(p["jaxpr"].jaxpr, p["jaxpr"].consts, [*vals[:consts], *carry, *xs], key))
        return outs[:states], outs[states:]

    start = engine.formed(vals[consts:carried])
    engine.record.trips *= p["length"]
    carry, ys = jax.lax.scan(
        body, start, (list(moving), keys), length=p["length"], reverse=p["reverse"], unroll=p["unroll"]
    )
    engine.record.trips //= max(p["length"], 1)
    return [*carry, *ys]


def _while(engine, eqn, vals, key):
    p = eqn.params
    a, b = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]

    def run(closed, consts, carry):
        count, *carry = carry
        return engine.formed(engine.run(closed.jaxpr, closed.consts, [*consts, *carry], fold_in(key, count)))

    _, *out = jax.lax.while_loop(
        lambda carry: run(p["cond_jaxpr"], vals[:a], carry)[0],
        lambda carry: [carry[0] + 1, *run(p["body_jaxpr"], vals[a:b], carry)],
        [jnp.int32(0), *engine.formed(vals[b:])],
    )
    return out


def _cond(engine, eqn, vals, key):
    index, *args = engine.formed(vals[:1]) + vals[1:]
    branches = [
        lambda key, *args, j=j: engine.formed(engine.run(j.jaxpr, j.consts, list(args), key))
        for j in eqn.params["branches"]
    ]
    return jax.lax.switch(index, branches, key, *args)


def _custom_vjp(engine, eqn, vals, key):
    """Both rules of the function, each evaluated with the views, so that the gradient of a weight reaches its node.

    Without a key: the function's own backward pass cannot know what was dropped.
    """
    fwd, bwd, forwarded = _shim.custom_vjp_rules(eqn)
    avals = [v.aval for v in eqn.invars]
    forward = jax.make_jaxpr(fwd)(*avals)
    backward = None

    @jax.custom_vjp
    def call(vals):
        inner = eqn.params["call_jaxpr"]
        return engine.formed(engine.run(inner.jaxpr, inner.consts, vals, None))

    def rule_fwd(vals):
        outs = engine.run(forward.jaxpr, forward.consts, vals, None)
        kept = len(outs) - len(eqn.outvars)
        own, outs = iter(outs[:kept]), engine.formed(outs[kept:])
        residuals = [next(own) if n is None else vals[n] for n in forwarded()]
        return outs, (residuals, vals)

    def rule_bwd(saved, cts):
        nonlocal backward
        residuals, vals = saved
        shapes = [jax.eval_shape(View.value, r) if isinstance(r, View) else jax.typeof(r) for r in residuals]
        backward = backward or jax.make_jaxpr(bwd)(*shapes, *cts)
        outs = engine.formed(engine.run(backward.jaxpr, backward.consts, [*residuals, *cts], None))
        return ([_cotangent(v, ct) for v, ct in zip(vals, outs, strict=True)],)

    call.defvjp(rule_fwd, rule_bwd)
    return call(vals)


def _cotangent(x, ct):
    """The cotangent of an array, or of what a view is made of."""
    return jax.vjp(View.value, x)[1](ct)[0] if isinstance(x, View) else ct


def _shard_map(engine, eqn, vals, key):
    """Every array of a node goes in by the specification of its kernel: its axes are the kernel's `in` and `out`."""
    p = eqn.params
    specs, inputs = [], []
    for x, spec in zip(vals, p["in_specs"], strict=True):
        own = _specs(x, spec) if isinstance(x, View) else spec
        x = engine.formed([x])[0] if own is None else x
        specs.append(spec if own is None else own)
        inputs.append(x)

    def body(key, *args):
        key = fold_in(key, jax.lax.axis_index(tuple(sorted(p["newly_manual_axes"]))))
        args = [_local(a) if isinstance(a, View) else a for a in args]
        return engine.formed(engine.run(p["jaxpr"], (), args, key))

    run = jax.shard_map(
        body, mesh=p["mesh"], in_specs=(jax.sharding.PartitionSpec(), *specs), out_specs=list(p["out_specs"]),
        check_vma=p["check_vma"], axis_names=p["newly_manual_axes"],
    )  # fmt: skip
    return list(run(key, *inputs))


def _specs(view: View, spec: Any) -> View | None:
    """The view with a `PartitionSpec` in place of every array; `None` if its parts are not those of its node's arrays.

    A branch over an array goes in by parts of its inputs and outputs; what cannot, such as codes, goes in whole.
    """
    layout, node = view.layout, view.node
    entries = [*spec, *[None] * (len(layout.dims) - len(spec))]
    by_axis = {}
    for d, entry in enumerate(entries):
        axis = layout.whole_axis(d)
        if entry is not None and axis is None:
            return None
        by_axis[axis] = entry
    split = {axis: entry for axis, entry in by_axis.items() if entry is not None}
    nest = [node]
    while isinstance(nest[-1], Reparam):
        nest.append(nest[-1].base if isinstance(nest[-1].base, Leaf) else value(nest[-1].base))
    *nodes, base = nest
    declared = all(isinstance(n, Branch) and None not in _dims(n).values() for n in nodes)
    if split and (isinstance(base, Leaf) or not declared):
        return None
    if not nodes:
        whole = jax.sharding.PartitionSpec(*[split.get(n) for n in range(len(layout.sizes))])
        return view.replace(node=jax.tree.map(lambda _: whole, base) if split else _whole(base), gain=_whole(view.gain))
    axes = nodes[0].axes
    named = {}
    for name, letter in (("in", IN), ("out", OUT)):
        first, *rest = [n for n, c in enumerate(axes) if c == letter]
        if any(n in split for n in rest):
            return None
        named[name] = split.get(first)
    stack = [split.get(n) for n, c in enumerate(axes) if c == STACK]

    def one(n):
        parts = lambda dims: jax.sharding.PartitionSpec(*stack, *[named.get(dim) for dim in dims])
        own = {name: parts(dims) if split else _whole(getattr(n, name)) for name, dims in _dims(n).items()}
        if isinstance(n.base, Leaf):
            return n.replace(**own, base=one(n.base) if isinstance(n.base, Reparam) else _whole(n.base))
        return n.replace(**own, base=jax.sharding.PartitionSpec(*[split.get(k) for k in range(len(axes))]))

    return view.replace(node=one(node), gain=_whole(view.gain))


def _dims(node: Node) -> dict[str, list[str] | None]:
    """The meaning of the axes of every array of a node, but for its base."""
    return {name: node.dims[name] for name in node.parts(Role.TRAINABLE, Role.FROZEN) if name != "base"}


def _whole(tree: Any) -> Any:
    return jax.tree.map(lambda _: jax.sharding.PartitionSpec(), tree)


def _local(view: View) -> View:
    """A view inside a `shard_map`, where its arrays are one device's."""
    base = view.node
    while isinstance(base, Reparam):
        base = base.base
    if isinstance(base, Leaf):
        return view
    layout = view.layout
    for d in range(len(layout.dims)):
        axis = layout.whole_axis(d)
        layout = layout if axis is None else layout.resize(d, value(base).shape[axis])
    return view.replace(layout=layout)


RULES: dict[str, Callable[[Any, Any, list[Any], Any], list[Any] | None]] = {
    "jit": _call,
    "pjit": _call,
    "closed_call": _call,
    "checkpoint": _remat,
    "remat2": _remat,
    "remat": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "custom_vjp_call": _custom_vjp,
    "shard_map": _shard_map,
}
