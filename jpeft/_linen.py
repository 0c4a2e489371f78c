"""Flax Linen: the nodes that stand beside modules, and calls of `model.apply` by other code."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax

from ._attention import at_work, passing
from ._engine import Record
from ._merge import beside
from ._mesh import around as on_mesh
from ._node import Additive, is_node, whole
from ._shared import unshare
from ._targets import Call, name_of


# Which door is open. It is part of the key of every `jax.jit` cache: what `nn.jit` or the caller's own `jax.jit` traced
# outside is traced anew inside, and the reverse.
_door = jax.make_user_context(None)


@contextlib.contextmanager
def additive_calls(record: Record, key: Any) -> Iterator[None]:
    """Within it, every module's call goes through the `Additive` nodes among the module's own parameters.

    They are read from the module's scope, where lifted transforms have sliced them already.
    """
    active: list[nn.Module] = []

    def interceptor(next_fun, args, kwargs, context):
        module = context.module
        # Modules may share a scope (`nn.share_scope`), and its nodes act once.
        inside = module.scope is None or module.scope in [m.scope for m in active]
        if inside or context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        active.append(module)
        try:
            call = _own(module, next_fun)
            for name, node in _beside(module):
                call = _around(node, call, _key(module, name, node, key))
            y = call(*args, **kwargs)
            _note(record, active, args, y)
        finally:
            active.pop()
        return y

    with _door("apply"), at_work(active), nn.intercept_methods(interceptor):
        yield


def _own(module: nn.Module, call: Callable) -> Callable:
    """The module's own `call`, as often as the nodes beside it want it: each time its parts can have their names."""
    changed = passing(module)
    first = iter(() if changed else (call,))

    @functools.wraps(call)
    def own(*args, **kwargs):
        run = next(first, None) or module.clone(parent=module.scope.rewound(), **changed)
        return run(*args, **kwargs)

    return own


def _around(node: Additive, call: Callable, key: Any) -> Callable:
    @functools.wraps(call)
    def around(*args, **kwargs):
        return on_mesh(node, call, key, args, kwargs)

    around.__signature__ = _open(inspect.signature(call))
    return around


def _open(signature: inspect.Signature) -> inspect.Signature:
    """The signature of a module's method, that takes options of its nodes, too."""
    known = [*signature.parameters.values()]
    if any(p.kind is p.VAR_KEYWORD for p in known):
        return signature
    return signature.replace(parameters=[*known, inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD)])


def _params(module: nn.Module) -> dict[str, Any]:
    found = module.variables.get("params", {})
    return found if hasattr(found, "items") else {}


def _beside(module: nn.Module) -> list[tuple[str, Additive]]:
    """The module's nodes, in the order in which they were attached, but for those that are innermost."""
    found = [(name, unshare(x)) for name, x in beside(_params(module))]
    return sorted(found, key=lambda pair: not pair[1].innermost)


def _key(module: nn.Module, name: str, node: Additive, key: Any) -> Any:
    """A key for a node that draws random numbers, as for dropout.

    **Raises** `ValueError` where the call was given one, but a lifted transform keeps it from the module.
    """
    if key is None or not node.random:
        return None
    if not module.has_rng("dropout"):
        path = "/".join((*module.path, name))
        raise ValueError(
            f"{path!r} has dropout or is random, but its module cannot get a key: the transform around it (`nn.scan`, "
            '`nn.vmap`, ...) does not pass the "dropout" rng on. Give it `split_rngs={"params": True, "dropout": '
            "True}`, or set the node's dropout to 0."
        )
    return module.make_rng("dropout")


def _note(record: Record, active: list[nn.Module], args: Any, y: Any) -> None:
    """Remember the sizes of what the innermost module is called with and returns."""
    sizes = [getattr(x, "shape", ()) for x in (args[0] if args else None, y[0] if isinstance(y, tuple) else y)]
    if all(len(s) for s in sizes):
        call = Call(sizes[0][-1], sizes[1][-1], _stack(record, active), sizes[0])
        record.modules.setdefault("/".join(active[-1].path), call)


def _stack(record: Record, active: list[nn.Module]) -> tuple[int, ...] | None:
    """The sizes of the axes of its parameters that a lifted transform has sliced away, if they came first.

    A module without parameters is stacked as the one around it is.
    """
    module = next((m for m in reversed(active) if not _is_bare(m)), active[0])
    for path, x in jax.tree_util.tree_leaves_with_path(_params(module)):
        leaf = record.names.get("/".join((*module.path, name_of(path))))
        if leaf is not None and not isinstance(leaf, Additive):
            outer, inner = whole(leaf).shape, x.shape
            return outer[: len(outer) - len(inner)] if outer[len(outer) - len(inner) :] == inner else None
    return ()


def _is_bare(module: nn.Module) -> bool:
    """Whether it has no parameters, but for what stands beside it."""
    return all(isinstance(x, Additive) for x in jax.tree.leaves(_params(module), is_leaf=is_node))


@contextlib.contextmanager
def root_calls(run: Callable) -> Iterator[None]:
    """Within it, `run(model, variables, args, kwargs, rngs)` takes the place of a call of a model that has nodes."""

    def interceptor(next_fun, args, kwargs, context):
        module = context.module
        inside = _door.value == "apply" or module.scope is None or context.method_name == "setup"
        if inside or not _has_nodes(_params(module)):
            return next_fun(*args, **kwargs)
        scope = module.scope
        rngs = {name: rng.as_jax_rng() for name, rng in scope.rngs.items()}
        mutable = [c for c in module.variables if scope.is_mutable_collection(c)]
        fresh = module.clone(parent=None, name=None)
        kwargs = {**kwargs, "method": context.method_name, "mutable": mutable or False}
        out = run(fresh, dict(module.variables), args, kwargs, rngs or None)
        if not mutable:
            return out
        out, updates = out
        for collection, values in updates.items():
            for name, x in values.items():
                scope.put_variable(collection, name, x)
        return out

    with _door("intercept"), nn.intercept_methods(interceptor):
        yield


def _has_nodes(tree: Any) -> bool:
    if hasattr(tree, "items"):
        return any(map(_has_nodes, tree.values()))
    return is_node(tree)
