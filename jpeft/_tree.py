"""Trees: put nodes in, take trees apart, fold nodes away."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax

from ._division import DATA_AXES, Division
from ._kernel import STACK, fold, stacked
from ._lazy import Lazy, read
from ._merge import beside, folded_in, number
from ._mesh import placed
from ._node import Additive, Affine, Leaf, Matrix, Node, Reparam, Role, is_node, is_param, rebox, sharding, value, whole
from ._shared import SHARED, repeated, resolve, unshare
from ._targets import Call, Option, Sites, Targets, kernels, name_of, named_leaves, options, parameters, select


Params = Any  # a pytree of arrays and nodes; nested dicts, for Flax
N = TypeVar("N", bound=Node)
_MISSING: Any = object()


def transform(fn: Callable) -> Callable:
    """Let `fn(params, ...)` wait for its tree: `lora(rank=8)` is `partial(lora, rank=8)`.

    **Raises** `TypeError`, at once, for an option that `fn` does not have.
    """
    known = inspect.signature(fn)

    @functools.wraps(fn)
    def waiting(params=_MISSING, /, **kwargs):
        if params is _MISSING:
            try:
                known.bind_partial(None, **kwargs)
            except TypeError as e:
                raise TypeError(f"{fn.__name__}: {e}") from None
            return functools.partial(fn, **kwargs)
        return fn(params, **kwargs)

    return waiting


def chain(*transforms: Callable) -> Callable:
    """One transform that applies `transforms` in order, each with a key of its own.

    `chain(jpeft.nf4(), jpeft.lora(rank=8))(params, key=key)`; `key` is `jax.random.key(0)` if left out. `sites` is for
    those of them that take sites and were given none.
    """

    def chained(params: Params, *, sites: Sites | None = None, key: jax.Array | None = None) -> Params:
        keys = jax.random.split(default(key), max(len(transforms), 1))
        for fn, k in zip(transforms, keys, strict=False):
            params = fn(params, key=k, **({"sites": sites} if sites is not None and takes_sites(fn) else {}))
        return params

    return chained


def takes_sites(fn: Callable) -> bool:
    """Whether a transform takes `sites`, and was given none."""
    option = inspect.signature(fn).parameters.get("sites")
    return option is not None and option.default is None


def default(key: jax.Array | None) -> jax.Array:
    """`key`, or `jax.random.key(0)` where there is none."""
    return jax.random.key(0) if key is None else key


def wrap(
    params: Params,
    new: Callable,
    *,
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
    over_nodes: bool = True,
    entrywise: bool = False,
    **given: Option,
) -> Params:
    """Put the `Matrix` node that `new(key, w, **options)` returns in place of every targeted kernel.

    `w` is one `(in, out)` matrix of the kernel: `new` never sees a kernel's shape or a stack of layers. A `Reparam`
    without a base takes what stood there as its base.

    **Arguments:**

    - `targets`, `sites`: which kernels, and what their axes mean. See the page on targets.
    - `key`: split for every target. `jax.random.key(0)` if left out.
    - `over_nodes`: whether the node can stand over another.
    - `entrywise`: whether the node acts on entries one by one: then it can stand for parameters of any shape, and by
      default does for every one of floating point but the output head's.
    - `given`: options of `new`, each one value or a mapping from patterns to values.

    **Raises** `ValueError` for targets that match nothing or are ambiguous, or hold a node that cannot be nested.
    """
    axes = (parameters if entrywise else kernels)(params, targets, sites)
    chosen = options(given, list(axes))
    keys = dict(zip(axes, jax.random.split(default(key), len(axes)), strict=True))
    shared = shared_arrays(params)

    def one(name, leaf):
        how = {"new": new, "axes": axes[name], "chosen": tuple(sorted(chosen[name].items()))}
        if isinstance(leaf, Lazy):
            if (node := _new_of_parts(keys[name], leaf, **how)) is not None:
                return node
            leaf = leaf.read()
        node = _new(keys[name], resolve(leaf, shared), over=sharding(leaf), **how)
        return node.replace(base=leaf) if isinstance(node, Reparam) and node.base is None else node

    def named(name, leaf):
        try:
            return one(name, leaf)
        except ValueError as e:
            raise e if type(e) is not ValueError else ValueError(f"{name}: {e}") from e

    return replaced(params, {name: functools.partial(named, name) for name in axes}, over_nodes)


def put(params: Params, new: Mapping[str, Callable[[Any], Node]], *, over_nodes: bool = False) -> Params:
    """The tree with `new[name](x)` in place of every parameter `x` that `new` names.

    **Raises** `ValueError`, with every path, for parameters that nodes have taken the place of, unless `over_nodes`.
    """
    return replaced(params, {name: lambda x, fn=fn: fn(read(x)) for name, fn in new.items()}, over_nodes)


def replaced(params: Params, new: Mapping[str, Callable[[Any], Node]], over_nodes: bool) -> Params:
    """`put`, of parameters that may still be in a file: `new` is to read them."""
    if not over_nodes:
        vacant(named_leaves(params), new)
    one = lambda path, x: new[name](x) if (name := name_of(path)) in new else x
    return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_param)


def vacant(leaves: Mapping[str, Any], names: Iterable[str]) -> None:
    """**Raises** `ValueError`, with every path, for parameters that nodes have taken the place of."""
    held = [f"  {name}: {type(leaves[name]).__name__}" for name in names if isinstance(leaves[name], Node)]
    if held:
        raise ValueError(
            "This method keeps no base to nest these nodes in: it would silently replace them.\n"
            + "\n".join(held)
            + "\n"
            "Apply this one first (in `jpeft.chain`, put it before), or leave these parameters out of `targets`."
        )


# Unused arguments are kept: on explicit axes they tell of the devices.
@functools.partial(jax.jit, static_argnames=("new", "axes", "chosen", "over"), keep_unused=True)
def _new(
    key: jax.Array, leaf: Any, *, new: Callable, axes: str, chosen: tuple[tuple[str, Any], ...], over: Any = None
) -> Node:
    """`new(key, w)` for every matrix `w` in `leaf`, divided as `over` divides the leaf.

    Compiled, so that a `w` which `new` does not use is not formed, and no more of one than a device's part.
    """

    def make(key, leaf):
        w = value(leaf)
        for size in (n for n, c in zip(w.shape, axes, strict=True) if c == STACK):
            split = functools.partial(jax.random.split, num=size)
            key = jax.vmap(split)(key) if key.ndim else split(key)
        node = stacked(lambda k, w: new(k, w, **dict(chosen)), axes.count(STACK))(key, fold(w, axes))
        return node.replace(axes=axes).settle(w)

    if over is None or over.mesh.size == 1:
        return make(key, leaf)
    division = Division.of(over, whole(leaf).shape, axes, DATA_AXES)
    return placed(make, key, leaf, to=lambda node: node.divided(division)).told(division)


def _new_of_parts(key: jax.Array, leaf: Lazy, *, axes: str, **how: Any) -> Node | None:
    """`_new` of a parameter that is read part by part; `None` where the node needs the whole."""
    whole = jax.eval_shape(functools.partial(_new, axes=axes, **how), key, leaf)
    if isinstance(whole, Reparam) or set(axes[: leaf.depth]) - {STACK}:
        return None

    def one(index, w):
        k = functools.reduce(lambda k, at: jax.random.split(k, at[0])[at[1]], zip(leaf.shape, index, strict=False), key)
        return _new(k, w, axes=axes[leaf.depth :], over=sharding(w), **how)

    return jax.tree.unflatten(jax.tree.structure(whole), jax.tree.leaves(leaf.map(one)))


def nodes_of(tree: Params, kind: type[N], made_by: str | None = None, *, nested: bool = True) -> dict[str, N]:
    """The nodes of a class, by name, those that others of it stand on too: they come before what stands on them.

    Without `nested` only the last of those that stand on each other.

    **Raises** `ValueError` if there are none and `made_by` names the transform that makes them.
    """
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, kind)):
        if isinstance(x, kind):
            name = name_of(path)
            beneath = nodes_of(x.parts(Role.TRAINABLE, Role.FROZEN), kind) if nested else {}
            found |= {f"{name}/{n}": y for n, y in beneath.items()} | {name: x}
    if made_by and not found:
        raise ValueError(f"There is no {kind.__name__} node in this tree: `jpeft.{made_by}(params)` makes them.")
    return found


def map_nodes(
    fn: Callable[[N], Any], tree: Params, kind: type[N], made_by: str | None = None, *, nested: bool = True
) -> Params:
    """The tree with `fn(node)` in place of the nodes that `nodes_of` finds, in its order; it raises as that does."""
    if made_by:
        nodes_of(tree, kind, made_by)

    def one(x):
        if not isinstance(x, kind):
            return x
        return fn(x.replace(**map_nodes(fn, x.parts(Role.TRAINABLE, Role.FROZEN), kind)) if nested else x)

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, kind))


def shared_arrays(params: Params) -> dict[str, jax.Array]:
    """The arrays at `params["jpeft_shared"]`, by name."""
    here = params.get(SHARED, {}) if isinstance(params, Mapping) else {}
    return {name: value(x) for name, x in here.items()}


def labels(params: Params) -> Params:
    """`"trainable"` or `"frozen"` for every array, as `optax.partition` (`optax.multi_transform`) wants it.

    `tx = optax.partition({"trainable": tx, "frozen": optax.set_to_zero()}, jpeft.labels)` is for code that keeps one
    tree. It makes XLA compute the gradients of frozen arrays where anything reads them all, such as clipping by the
    global norm, and `jax.grad` refuses the integer codes of a quantized base: prefer `partition`.
    """

    def label(x):
        if not is_node(x):
            return jax.tree.map(lambda _: Role.FROZEN.value, x)
        trained = {n: jax.tree.map(lambda _: Role.TRAINABLE.value, p) for n, p in x.parts(Role.TRAINABLE).items()}
        return x.replace(**trained, **{n: labels(p) for n, p in x.parts(Role.FROZEN).items()})

    return jax.tree.map(label, params, is_leaf=is_node)


def partition(params: Params) -> tuple[Params, Params]:
    """`(trainable, frozen)`: two trees of one structure, each `None` where the other has its array.

    Differentiate with respect to `trainable` alone, and `combine` the two inside the loss.
    """
    which = labels(params)
    pick = lambda role: jax.tree.map(lambda mark, x: x if mark == role.value else None, which, params)
    return pick(Role.TRAINABLE), pick(Role.FROZEN)


def combine(*trees: Params) -> Params:
    """Undo `partition`: at every place the array of the first tree that has one."""
    return jax.tree.map(lambda *xs: next((x for x in xs if x is not None), None), *trees, is_leaf=lambda x: x is None)


def _plain(params: Params, one: Callable, absorb: Callable = lambda _, __, own: own, path: str = "") -> Params:
    """The tree with `one(x)` in place of every parameter, and without what stands beside parameters.

    `absorb(path, module, own)` may change what has become of a module's `own` parameters.
    """
    if not isinstance(params, Mapping):
        return jax.tree.map(one, params, is_leaf=is_param)
    kept = {k: x for k, x in params.items() if k != SHARED and not isinstance(x, Additive)}
    made = {k: _plain(x, one, absorb, f"{path}{k}/") for k, x in kept.items()}
    emptied = [k for k, x in made.items() if isinstance(x, Mapping) and not x and kept[k]]  # it has no parameters
    return absorb(path, params, {k: x for k, x in made.items() if k not in emptied})


def merge(params: Params) -> Params:
    """Plain arrays in the original structure: every node becomes the parameter that it stands for.

    The sum is formed in float32 at least and cast last to the parameter's dtype.

    An `Affine` beside a module becomes a part of the module's kernel and bias.

    **Raises** `ValueError`, with every path, for nodes that act on activations: those are no function of the weights;
    and for modules that cannot take in what stands beside them, such as a bias where there is none.
    """
    shared, stuck = shared_arrays(params), []
    own_arrays = lambda node: unshare(resolve(node, shared))

    def check(path, module, own):
        for name, node in beside(module):
            try:
                jax.eval_shape(folded_in, own_arrays(node), own)
            except ValueError as e:
                stuck.append(f"  {path}{name}: {type(node).__name__}, {e}")
        return own

    def absorb(path, module, own):
        return functools.reduce(lambda own, found: folded_in(own_arrays(found[1]), own), beside(module), own)

    _plain(params, lambda x: resolve(x, shared), check)  # before anything is computed
    if stuck:
        raise ValueError("These cannot be merged: go on calling the model through `jpeft.apply`.\n" + "\n".join(stuck))
    return _plain(params, lambda x: rebox(x, value(resolve(x, shared))) if isinstance(x, Leaf) else x, absorb)


def strip(params: Params) -> Params:
    """The bases alone: no adapter, nothing beside a module. What has no base, such as a quantized kernel, stays.

    An unfrozen parameter has taken the place of its base: its present value is returned.
    """

    def base(x):
        while isinstance(x, Reparam):
            x = x.base
        return x if isinstance(x, Matrix) or not isinstance(x, Leaf) else value(x)

    return _plain(params, base)


def attach(
    params: Params,
    new: Callable,
    *,
    name: str,
    targets: Targets,
    sites: Sites | None = None,
    key: jax.Array | None = None,
    **given: Option,
) -> Params:
    """Put the `Additive` that `new(key, features_in, features_out, **options)` returns beside every targeted module.

    **Arguments:**

    - `name`: the node's name among the module's parameters; `name_1`, `name_2`, ... where there are nodes beside the
      module already. Later ones act around earlier ones.
    - `targets`: paths of modules, `""` for the model itself. Patterns or a predicate as for parameters.
    - `sites`: tells what a module is called with and returns, and how it is stacked. Without it a module must own a
      two-dimensional kernel, which tells its features.
    - `key`, `given`: as for `wrap`.

    **Raises** `ValueError` for targets that match no module, and for modules of which nothing tells the features.
    """
    known = modules(params)
    found = list(select(targets, known, "module"))
    chosen = options(given, found)
    calls = {path: _features(known[path], path, sites) for path in found}
    unknown = [path for path, call in calls.items() if call is None or call.stack is None]
    if unknown:
        raise ValueError(
            f"How many features go in and out, and over which first axes are the modules stacked? {unknown[:8]}\n"
            'Let the model tell: sites = jpeft.sites(model, {"params": params}, *example_inputs), and pass sites=sites.'
        )
    at = {}
    for path, k in zip(found, jax.random.split(default(key), len(found)), strict=True):
        call = calls[path]
        make = stacked(lambda k, c=call, o=chosen[path]: new(k, c.features_in, c.features_out, **o), len(call.stack))
        node = repeated(make(jax.random.split(k, call.stack) if call.stack else k), call.stack)
        at[path] = node.replace(axes=_axes(path, sites)) if isinstance(node, Affine) else node
    return place(params, at, name)


def modules(params: Params) -> dict[str, dict[str, Any]]:
    """The parameters of every module, by its path; `""` is the model."""
    found = {"": params}
    for k, x in params.items():
        if isinstance(x, Mapping) and k != SHARED:
            found |= {f"{k}/{path}" if path else k: tree for path, tree in modules(x).items()}
    return found


def _features(own: dict[str, Any], path: str, sites: Sites | None) -> Call | None:
    if sites is not None and path in sites.modules:
        return sites.modules[path]
    shape = whole(own["kernel"]).shape if "kernel" in own and "kernel" in named_leaves(own) else ()
    return Call(*shape, ()) if len(shape) == 2 else None


def _axes(path: str, sites: Sites | None) -> str:
    """The letters of the axes of a module's kernel; none where `sites` has not found them out."""
    site = None if sites is None else sites.get(f"{path}/kernel".lstrip("/"))
    return "io" if site is None else site.axes or ""


def place(params: Params, at: dict[str, Node], name: str) -> Params:
    """The tree with a node beside the parameters of every module whose path `at` holds; it may have had none."""

    def walk(tree, path):
        if not isinstance(tree, Mapping):
            return tree
        inside = f"{path}/" if path else ""
        below = {p.removeprefix(inside).partition("/")[0] for p in at if p != path and p.startswith(inside)}
        here = {k: walk(tree.get(k, {}), inside + k) for k in (*tree, *sorted(below - tree.keys()))}
        if path in at:
            there = beside(here)  # a number tells the order of all of them
            here[f"{name}_{1 + number(there[-1][0])}" if there else name] = at[path]
        return here

    return walk(params, "")
