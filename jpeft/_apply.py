"""The doors: run a model, or any function of parameters, with the nodes in its parameters at work."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax

from . import _linen
from ._engine import Record, evaluate
from ._expressions import directed, place_of
from ._node import Additive, Leaf, is_node, is_param, whole
from ._operands import fold_in
from ._shared import SHARED, resolve
from ._targets import Site, Sites
from ._tree import Params, shared_arrays


# Part of the key of every `jax.jit` cache: a module under `nn.jit` whose trace was reused would not be seen called.
_trace_of = jax.make_user_context(None)


class UnusedNodeError(ValueError):
    """A node that the traced call never uses: training it would do nothing."""


@dataclasses.dataclass(frozen=True)
class Coverage(Mapping[str, str]):
    """For every node's path how a call uses it: `"branched"`, `"merged"` or `"unused"`.

    *branched*: where it is consumed, without a copy of the weight that outlives the operation. *merged*: the weight is
    formed first, which costs a product of the weight's size more. *unused*: never.
    """

    ways: Mapping[str, str]
    ops: Mapping[str, tuple[str, ...]]  # the operations that consume it
    kinds: Mapping[str, str]  # the class of the node

    def __getitem__(self, path):
        return self.ways[path]

    def __iter__(self):
        return iter(self.ways)

    def __len__(self):
        return len(self.ways)

    def __str__(self):
        width = max(map(len, self.ways), default=0)
        rows = [f"{p:{width}}  {self.kinds[p]:12}  {way:9} {' '.join(self.ops[p])}" for p, way in self.items()]
        return "\n".join(map(str.rstrip, rows))

    @classmethod
    def of(cls, record: Record) -> "Coverage":
        names = record.names
        return cls(
            {n: record.way(n) for n in names},
            {n: tuple(record.ops[n]) for n in names},
            {n: type(x).__name__ for n, x in names.items()},
        )

    def check(self) -> None:
        """**Raises** `UnusedNodeError`, with every path, if a node is unused."""
        unused = [f"  {path}: {self.kinds[path]}" for path, way in self.items() if way == "unused"]
        if unused:
            raise UnusedNodeError(
                "This call never uses these nodes, so that they would not train:\n" + "\n".join(unused) + "\n"
                "Leave them out of `targets`; or, where this call is meant to run only a part of the model, pass "
                "`allow_unused=True`. `print(jpeft.coverage(model, variables, ...))` shows what becomes of every node."
            )


def apply(
    model_or_function: nn.Module | Callable,
    variables: Any,
    *args: Any,
    rngs: Any = None,
    adapters: Any = None,
    allow_unused: bool = False,
    **kwargs: Any,
) -> Any:
    """`model.apply(variables, *args, **kwargs)`, or `function(variables, *args, **kwargs)`, with the nodes at work.

    For a `linen` module the nodes are in `variables["params"]`; for a function, anywhere in the tree `variables`, which
    is its first argument.

    **Arguments:**

    - `rngs`: as for `model.apply`. A `"dropout"` key there, or a key by itself, turns the dropout and the random gates
      of the nodes on; it is passed on to a module, and not to a function.
    - `adapters`: which of the adapters of a `stack` act: a name or a number; integers `(batch,)` for the rows, below
      zero for none; weights `(adapters,)`, `(batch, adapters)` or `(batch, tokens, adapters)`; or an expression, such
      as `jpeft.Average("a", "b")`. Another choice of the same kind is no new trace.
    - `allow_unused`: whether a node may be unused in this call.

    **Raises** `ValueError` for `adapters` that there are not, and `UnusedNodeError` for a node that the call never
    uses: its training would be a silent no-op.
    """
    out, record = _run(model_or_function, variables, args, kwargs, rngs, adapters)
    if not allow_unused:
        Coverage.of(record).check()
    return out


def coverage(
    model_or_function: nn.Module | Callable,
    variables: Any,
    *args: Any,
    rngs: Any = None,
    adapters: Any = None,
    **kwargs: Any,
) -> Coverage:
    """What `apply` does with every node: `"branched"`, `"merged"` or `"unused"`, by path.

    The call is traced and not run: `variables` and `args` may hold `jax.ShapeDtypeStruct`s.
    """
    return Coverage.of(_trace(model_or_function, variables, args, kwargs, rngs, adapters, lambda _, x: is_node(x)))


def sites(
    model_or_function: nn.Module | Callable,
    variables: Any,
    *args: Any,
    rngs: Any = None,
    adapters: Any = None,
    **kwargs: Any,
) -> Sites:
    """What the model does with every parameter: a `Site` by path.

    The call is traced and not run, so it costs no FLOPs, and `variables` and `args` may hold `jax.ShapeDtypeStruct`s:
    `jpeft.sites(model, jax.eval_shape(model.init, key, x), x)`. Pass the result as `sites=` to a transform: it settles
    the axes of kernels with more than two, and which kernels a matrix product consumes. `print(sites)` shows a table.
    """
    record = _trace(model_or_function, variables, args, kwargs, rngs, adapters, lambda _, x: True)
    found = {}
    for name, leaf in record.names.items():
        if isinstance(leaf, Additive):
            continue
        aval = whole(leaf)
        letters = [record.letters[name].get(n, "?") for n in range(len(aval.shape))]
        axes = None if "?" in letters or not record.ops[name] else "".join(letters)
        flops = sum(record.flops[name].values())
        found[name] = Site(name, aval.shape, aval.dtype, axes, tuple(record.ops[name]), flops)
    return Sites(found, record.modules)


@contextlib.contextmanager
def intercept(*, adapters: Any = None, allow_unused: bool = False) -> Iterator[None]:
    """Within it, `model.apply` of any `linen` module does what `jpeft.apply` does.

    For code that calls `model.apply` itself: a trainer, a generation loop. It must be entered inside a function that is
    transformed by `jax.jit`, or around its first call.
    """

    def run(model, variables, args, kwargs, rngs):
        return apply(model, variables, *args, rngs=rngs, adapters=adapters, allow_unused=allow_unused, **kwargs)

    with _linen.root_calls(run):
        yield


def _run(target, variables, args, kwargs, rngs, adapters, follow=lambda _, x: is_node(x)):
    record = Record()
    key = rngs if rngs is None or not isinstance(rngs, Mapping) else rngs.get("dropout")
    linen = isinstance(target, nn.Module)
    if linen and key is rngs is not None:
        rngs = {"params": key, "dropout": key}  # Flax takes one key for the first alone
    params: Params = variables["params"] if linen else variables
    bare = {k: x for k, x in params.items() if k != SHARED} if isinstance(params, Mapping) else params

    def fn(params):
        with _linen.additive_calls(record, key):
            if linen:
                return target.apply({**variables, "params": params}, *args, rngs=rngs, **kwargs)
            return target(params, *args, **kwargs)

    bare = bare if key is None else _drawn(bare, key)
    bare = bare if adapters is None else directed(bare, adapters, place_of((args, kwargs), bare))
    return evaluate(fn, resolve(bare, shared_arrays(params)), follow, key, record), record


def _drawn(params: Params, key: jax.Array) -> Params:
    """The tree with the noise of its nodes drawn, of each with a key of its own."""
    leaves, treedef = jax.tree.flatten(params, is_leaf=is_param)
    noisy = (x.drawn(fold_in(key, n)) if isinstance(x, Leaf) else x for n, x in enumerate(leaves))
    return treedef.unflatten(noisy)


def _trace(target, variables, args, kwargs, rngs, adapters, follow) -> Record:
    kept = []

    def run(variables, args, kwargs, rngs):
        kept.append(_run(target, variables, args, kwargs, rngs, adapters, follow)[1])

    arrays, rebuild = _abstract((variables, args, kwargs, rngs))
    with _trace_of(object()):
        jax.eval_shape(lambda arrays: run(*rebuild(arrays)), arrays)
    return kept[0]


def _abstract(tree: Any):
    """The arrays of a tree, and a function that puts arrays back in their place; the rest stays as it is."""
    leaves, treedef = jax.tree.flatten(tree)
    arrays = [x for x in leaves if hasattr(x, "dtype")]

    def rebuild(arrays):
        arrays = iter(arrays)
        return treedef.unflatten([next(arrays) if hasattr(x, "dtype") else x for x in leaves])

    return arrays, rebuild
