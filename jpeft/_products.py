"""The operations that consume a kernel: what a `Branch` adds to them, and what each tells of a kernel's axes.

A rule takes the equation, its inputs with one `View` among them, and a key, and returns a `Product`; or `None` where
the view is not used in a way that it knows.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ._mesh import automatic, everywhere
from ._node import Amplified, Branch, Leaf, Reparam
from ._operands import Lookup, NoRule, Routed, Window, fold_in
from ._shim import bind
from ._view import View


@dataclasses.dataclass(frozen=True)
class Product:
    """An operation that is linear in a parameter."""

    name: str
    view: View
    place: int  # of the view among the inputs
    branch: Callable[[View, jax.Array | None], jax.Array | None]  # what the node of a view adds to the output
    letters: dict[int, str]  # the letter of each dimension of the view
    flops: float
    outputs: Callable[[View, jax.Array], jax.Array | None]  # a `(stacks..., out)` as it multiplies the output


def dot_general(eqn: Any, vals: list[Any]) -> Product | None:
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    if all(isinstance(v, View) for v in vals):
        return None
    first = isinstance(vals[0], View)
    view, x = vals if first else reversed(vals)
    (vc, vb), (xc, xb) = ((lc, lb), (rc, rb)) if first else ((rc, rb), (lc, lb))
    if not vc:
        return None
    free = [d for d in range(len(view.layout.dims)) if d not in (*vc, *vb)]
    letters = dict.fromkeys(vc, "i") | dict.fromkeys(vb, "s") | dict.fromkeys(free, "o")
    out = eqn.outvars[0].aval
    contracted = math.prod(x.shape[d] for d in xc)

    def branch(view, key):
        return _dot(view, x, (vc, xc), (vb, xb), free, first, out.shape, eqn.params["precision"], key)

    def outputs(view, g):
        return _outputs(view.layout, g, vc, vb, free, first, out.ndim)

    return Product("dot_general", view, 0 if first else 1, branch, letters, 2.0 * out.size * contracted, outputs)


def _dot(view, x, contract, batch, free, first, out_shape, precision, key):
    """`x . (W' - W)`: bring `x` to `(stacks..., free..., in)`, branch for every stacked matrix, put that back."""
    layout = view.layout
    side = [t for t in layout.of_dims(contract[0]) if layout.letters[t] != "s"]
    forward = set(side) == set(layout.atoms("i"))
    if not forward and set(side) != set(layout.atoms("o")):
        return None
    if any(layout.letters[t] != "s" for t in layout.of_dims(batch[0])):
        return None
    inner, outer = (layout.atoms("i"), layout.atoms("o")) if forward else (layout.atoms("o"), layout.atoms("i"))
    stacks = layout.atoms("s")

    # the dimensions of x: atoms of the kernel where it meets the kernel, (d,) where it does not
    meets = {xd: vd for vds, xds in (contract, batch) for vd, xd in zip(vds, xds, strict=True)}
    pieces = [t for d in range(x.ndim) for t in (layout.of_dims([meets[d]]) if d in meets else ((d,),))]
    sizes = dict(enumerate(layout.sizes)) | {(d,): n for d, n in enumerate(x.shape)}
    size = sizes.__getitem__
    x_free = [t for t in pieces if isinstance(t, tuple)]
    present = [t for t in stacks if t in pieces]
    x = x.astype(view.dtype).reshape([size(t) for t in pieces])
    x = jnp.transpose(x, [pieces.index(t) for t in (*present, *x_free, *inner)])
    x = x.reshape([size(t) for t in (*present, *x_free)] + [math.prod(map(size, inner))])

    width, stacked = math.prod(map(size, outer)), {t: t in present for t in stacks}
    with _precision(precision):
        y = _stacked_branch(view.adapter, x, key, forward, width, stacked, size)
    y = y.reshape([size(t) for t in (*stacks, *x_free, *outer)])
    summed = [t for t in stacks if t in layout.of_dims(contract[0])]
    y = jnp.sum(y, axis=[stacks.index(t) for t in summed]) if summed else y
    have = [t for t in (*stacks, *x_free, *outer) if t not in summed]
    lead, rest = layout.of_dims(batch[0]), layout.of_dims(free)
    want = [*lead, *rest, *x_free] if first else [*lead, *x_free, *rest]
    lost = [t for t in have if t not in want]  # stacked, of size one
    return view.scaled(jnp.transpose(y, [have.index(t) for t in (*want, *lost)]).reshape(out_shape))


def _outputs(layout, g, contract, batch, free, first, ndim):
    """`g (stacks..., out)` in the place of its axes in the output; `None` if it is not there."""
    if set(layout.of_dims(contract)) != set(layout.atoms("i")):
        return None
    have, want = [*layout.atoms("s"), *layout.atoms("o")], layout.of_dims([*batch, *free])
    lost = [t for t in have if t not in want]  # stacked, of size one
    g = jnp.transpose(g.reshape([layout.sizes[t] for t in have]), [have.index(t) for t in (*want, *lost)])
    lead, rest = ([layout.shape[d] for d in dims] for dims in (batch, free))
    ones = [1] * (ndim - len(lead) - len(rest))
    return g.reshape([*lead, *rest, *ones] if first else [*lead, *ones, *rest])


def _stacked_branch(node, x, key, forward, width, stacks, size):
    """`node.branch(x)`, or its transpose in `x` onto `width` inputs, for every stacked matrix."""

    def one(node, x, key):
        if forward:
            return node.branch(x, key)
        spec = jax.ShapeDtypeStruct((*x.shape[:-1], width), x.dtype)
        (y,) = jax.linear_transpose(lambda z: node.branch(z, None), spec)(x)
        return y

    if key is not None:
        key = jax.random.split(key, [size(t) for t in stacks]) if stacks else key
    return node.each(one, x, key, mapped=[(0 if has else None, None if key is None else 0) for has in stacks.values()])


def _precision(precision: Any):
    """The product's precision for those of a branch."""
    match precision[0] if isinstance(precision, tuple) else precision:
        case jax.lax.Precision() as one:
            return jax.default_matmul_precision(one.name.lower())
        case jax.lax.DotAlgorithmPreset() as one:
            return jax.default_matmul_precision(one.name)
    return contextlib.nullcontext()


def conv(eqn: Any, vals: list[Any]) -> Product | None:
    x, view = vals
    params = eqn.params
    numbers = params["dimension_numbers"]
    grouped = params["feature_group_count"] != 1 or params["batch_group_count"] != 1
    if grouped or isinstance(x, View):
        return None
    feature, *window = numbers.rhs_spec
    features = numbers.out_spec[1]
    letters = dict.fromkeys(window, "i") | {feature: "o"}
    out = eqn.outvars[0].aval

    def branch(view, key):
        layout = view.layout
        inner = layout.of_dims(window)
        if set(inner) != set(layout.atoms("i")) or layout.of_dims([feature]) != layout.atoms("o"):
            return None
        if any(c == "s" for c in layout.letters):
            return None

        def convolve(x, a):  # a: (in, rank), as a kernel of rank features
            order = layout.atoms("i")
            a = a.reshape([layout.sizes[t] for t in order] + [a.shape[-1]])
            a = jnp.transpose(a, [order.index(t) for t in inner] + [len(order)])
            a = a.reshape([layout.shape[d] for d in window] + [a.shape[-1]])
            place = {d: n for n, d in enumerate((*window, feature))}
            a = jnp.transpose(a, [place[d] for d in range(a.ndim)])
            (y,) = bind(eqn, [x, a])
            return jnp.moveaxis(y, features, -1).astype(x.dtype)

        with _precision(params["precision"]):
            y = view.branch(Window(x, convolve), key)
        return view.scaled(jnp.moveaxis(y, -1, features))

    size = math.prod(view.layout.shape[d] for d in window)
    outputs = lambda _, g: g.reshape([-1 if d == features else 1 for d in range(out.ndim)])
    return Product("conv", view, 1, branch, letters, 2.0 * out.size * size, outputs)


def gather(eqn: Any, vals: list[Any]) -> Product | None:
    """A lookup: whole rows of the view, by indices into its first dimension."""
    view, index = vals
    numbers, sizes, out = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], eqn.outvars[0].aval
    rest = tuple(range(1, len(sizes)))
    rows = out.ndim - len(rest)
    plain = (
        not isinstance(index, View)
        and numbers.start_index_map == numbers.collapsed_slice_dims == (0,)
        and not (numbers.operand_batching_dims or numbers.start_indices_batching_dims)
        and tuple(sizes) == (1, *view.layout.shape[1:])
        and numbers.offset_dims == tuple(range(rows, out.ndim))
    )
    if not plain:
        return None

    def branch(view, key):
        layout = view.layout
        whole = layout.of_dims([0]) == layout.atoms("i") and layout.of_dims(rest) == layout.atoms("o")
        if not whole or "s" in layout.letters:
            return None

        def look(a):
            changes = {"dimension_numbers": numbers._replace(offset_dims=(rows,)), "slice_sizes": (1, a.shape[-1])}
            return bind(eqn, [a, index], **changes)[0]

        y = view.branch(Lookup(look, view.dtype), key)
        return view.scaled(y.reshape(out.shape))

    outputs = lambda _, g: g.reshape((1,) * rows + out.shape[rows:])
    return Product("gather", view, 0, branch, {0: "i"} | dict.fromkeys(rest, "o"), 0.0, outputs)


def ragged_dot(eqn: Any, vals: list[Any]) -> Product | None:
    """`(tokens, in) . (experts, in, out)` with the tokens in the order of their experts."""
    x, view, groups = vals
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (xc, vc), (xb, vb) = numbers.dot_dimension_numbers
    usual = not (xb or vb) and tuple(xc) == (1,) and tuple(vc) == (1,) and tuple(numbers.rhs_group_dimensions) == (0,)
    if not usual or isinstance(x, View) or isinstance(groups, View) or x.ndim != 2:
        return None
    out = eqn.outvars[0].aval

    def branch(view, key):
        layout = view.layout
        one = [layout.letters.count(c) for c in "sio"] == [1, 1, 1] and layout.letters.replace("?", "") == "sio"
        if not one or [layout.letters[t] for t in layout.of_dims(range(3))] != ["s", "i", "o"]:
            return None
        return view.scaled(view.branch(Routed(x, groups), key).x)

    outputs = lambda _, g: jnp.repeat(g, groups, axis=0, total_repeat_length=len(x))
    letters = {0: "s", 1: "i", 2: "o"}
    return Product("ragged_dot", view, 1, branch, letters, 2.0 * out.size * x.shape[1], outputs)


RULES: dict[str, Callable[[Any, list[Any]], Product | None]] = {
    "dot_general": dot_general,
    "conv_general_dilated": conv,
    "gather": gather,
    "ragged_dot_general": ragged_dot,
}


def compute(product: Product, eqn: Any, vals: list[Any], key: Any, note: Callable) -> jax.Array:
    """The output of a product: that of the base, and what each branch adds; by its value, what has no branch.

    A value that has to be formed is formed inside a `jax.checkpoint` with the operation that consumes it, so that it
    does not outlive it: its residual is what it is made of, and the backward pass forms it again.
    """
    others = [v for n, v in enumerate(vals) if n != product.place]
    fill = lambda w, others: bind(eqn, [*others[: product.place], w, *others[product.place :]])[0]
    view, extra = product.view, []
    while (found := _on_activations(product, eqn, vals, view, fold_in(key, len(extra)))) is not None:
        note(view.name, "branched")
        extra.append(found)
        view = view.base
    y = _product_of(view, fill, others, note)
    for part, gain in reversed(extra):  # the innermost node first: a gain is of all that is below it
        y = y + part.astype(y.dtype)
        y = y if gain is None else y * gain.astype(y.dtype)
    return y


def _on_activations(
    product: Product, eqn: Any, vals: list[Any], view: View, key: Any
) -> tuple[jax.Array, jax.Array | None] | None:
    """What the node adds to the output, and what it then multiplies it with; `None` where its value must be taken."""
    if not isinstance(view.node, Branch | Amplified):
        return None

    def there(x):
        if x is None:
            raise NoRule
        return x

    def branch(vals, view, key):
        return there(RULES[eqn.primitive.name](eqn, vals).branch(view, key))

    def gain(view):
        return there(product.outputs(view, view.node.of_base(lambda node, w: node.gain(w))))

    out = eqn.outvars[0].aval
    try:
        part = automatic(branch, vals, view, key, like=out)
        return part, None if isinstance(view.node, Branch) else automatic(gain, view, like=everywhere(out))
    except NoRule:
        return None


def _product_of(view: View, fill: Callable, others: list[Any], note: Callable) -> jax.Array:
    note(view.name, "merged" if isinstance(view.node, Reparam) else "branched")
    if isinstance(view.node, Leaf):
        return jax.checkpoint(lambda view, others: fill(view.value(), others))(view, others)
    return fill(view.value(), others)
