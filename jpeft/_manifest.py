"""Trees of nodes as JSON: their structure, and for every array where it is to be found again.

    {"node": "jpeft:LoRA", "fields": {"base": {"base": {...}}, "a": {"array": "dense/kernel/a"}, ...}}

An array is either `{"array": path}`, kept beside the JSON, or `{"base": {"shape", "dtype", "sum"}}`: one that a base
tree has, known by its checksum.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from ._node import Additive, Leaf, Node, Role, is_param, value
from ._shared import SHARED, Ref
from ._storage import Json, record
from ._targets import name_of


def pointer(path: Sequence) -> str:
    """A key path as `layers_0/query/kernel`, with `/` in a key as `~1` and `~` as `~0`: no two paths have one name."""
    return "/".join(name_of([k]).replace("~", "~0").replace("/", "~1") for k in path)


def keys(name: str) -> list[str]:
    """Undo `pointer`."""
    return [k.replace("~1", "/").replace("~0", "~") for k in name.split("/")]


def describe(x: Any, path: str, arrays: dict[str, Any], *, of_base: bool) -> Json:
    """`x` as JSON. The arrays that no base tree has are put into `arrays`, by path.

    `of_base` tells that `x` stands where a base tree has a parameter.

    **Raises** `TypeError` for what cannot be read back without running code, such as a function in a static field.
    """
    if x is None:
        return None
    if isinstance(x, Ref):
        return {"ref": x.name, "stack": list(x.stack)}
    if isinstance(x, Node):
        from_base = _from_base(x) if of_base else []
        fields = constants(x, path)
        for n, part in x.parts(Role.TRAINABLE, Role.FROZEN).items():
            fields[n] = describe(part, f"{path}/{n}", arrays, of_base=n in from_base)
        return {"node": class_name(type(x)), "fields": fields}
    if isinstance(x, meta.AxisMetadata):
        return describe(value(x), path, arrays, of_base=of_base)
    if of_base:
        return {"base": record(x)}
    if type(x) in (dict, list, tuple):
        items = x.items() if isinstance(x, dict) else enumerate(x)
        parts = {k: describe(part, f"{path}/{pointer([k])}", arrays, of_base=False) for k, part in items}
        return {type(x).__name__: parts if isinstance(x, dict) else list(parts.values())}
    if not isinstance(x, jax.Array | np.ndarray):
        return _constant(x, path)
    arrays[path] = x
    return {"array": path}


def constants(node: Node, path: str) -> dict[str, Json]:
    """The static fields of a node, but for those that tell of this run's devices."""
    static = {n: part for n, part in node.parts(Role.STATIC).items() if n not in node.local}
    return {n: _constant(part, f"{path}: {n}") for n, part in static.items()}


def differences(saved: Mapping[str, str], given: Mapping[str, str]) -> list[str]:
    """Whatever only one of them has, or both in another way, by name and in words."""
    faults = [f"missing: {name}, {x}" for name, x in saved.items() if name not in given]
    faults += [f"unexpected: {name}, {x}" for name, x in given.items() if name not in saved]
    both = [(name, x, given[name]) for name, x in saved.items() if name in given]
    return faults + [f"changed: {name}, {then} when saved, {now} now" for name, then, now in both if then != now]


def kept(params: Any) -> Any:
    """For every array of a tree whether it is kept with what trains: it trains itself, or belongs to a node and to no
    base, such as a mask or a random projection.
    """
    paths, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_param)
    beside = lambda path, x: isinstance(x, Additive) or name_of(path).startswith(f"{SHARED}/")
    return tree.unflatten([_kept(x, of_base=not beside(path, x)) for path, x in paths])


def _kept(x: Any, of_base: bool) -> Any:
    if not isinstance(x, Node):
        return jax.tree.map(lambda _: not of_base, x)
    from_base = _from_base(x) if of_base else []
    trained = {name: jax.tree.map(lambda _: True, part) for name, part in x.parts(Role.TRAINABLE).items()}
    return x.replace(**trained, **{n: _kept(part, n in from_base) for n, part in x.parts(Role.FROZEN).items()})


def is_form(x: Any) -> bool:
    """Whether `x` is a parameter in another form, such as a quantized one: it trains nothing and has no base."""
    return isinstance(x, Leaf) and x.original is None and Role.TRAINABLE not in x.roles.values()


def kind(x: Any) -> str:
    """What stands in a tree, in a word: `array`, `NF4`, `LoRA(NF4)`."""
    if not isinstance(x, Node):
        return "array"
    over = f"({kind(x.original)})" if isinstance(x, Leaf) and isinstance(x.original, Leaf) else ""
    return type(x).__name__ + over


def _from_base(node: Leaf) -> list[str]:
    """The fields that a base tree holds: the base of a node, and all arrays of one that is a form of the parameter."""
    frozen = node.parts(Role.FROZEN)
    return list(frozen) if is_form(node) else [name for name, x in frozen.items() if x is node.original]


def _constant(x: Any, where: str) -> Json:
    if isinstance(x, tuple):
        return {"tuple": [_constant(part, where) for part in x]}
    x = x.item() if isinstance(x, np.generic) else x
    if x is None or isinstance(x, bool | int | float | str):
        return x
    try:
        return {"dtype": str(jnp.dtype(x))}
    except TypeError:
        raise TypeError(f"{where} is {x!r}: what is saved are numbers, strings, dtypes and tuples of them.") from None


def build(x: Json, arrays: Mapping[str, jax.Array]) -> Any:
    """Undo `describe`. In place of an array of the base stands its `ShapeDtypeStruct`.

    **Raises** `KeyError` for a class of nodes that is unknown, `TypeError` for one that has other fields now.
    """
    match x:
        case {"node": name, "fields": fields}:
            return classes()[name](**{field: build(part, arrays) for field, part in fields.items()})
        case {"array": path}:
            return arrays[path]
        case {"base": {"shape": shape, "dtype": dtype}}:
            return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
        case {"ref": name, "stack": stack}:
            return Ref(name, tuple(stack))
        case {"dtype": name}:
            return jnp.dtype(name)
        case {"tuple": parts}:
            return tuple(build(part, arrays) for part in parts)
        case {"list": parts}:
            return [build(part, arrays) for part in parts]
        case {"dict": parts}:
            return {k: build(part, arrays) for k, part in parts.items()}
    return x


def class_name(cls: type) -> str:
    """`module:Name`, of the outermost package that has the class: within it the class may move."""
    parts = cls.__module__.split(".")
    packages = (".".join(parts[:n]) for n in range(1, len(parts)))
    has = lambda package: getattr(sys.modules.get(package), cls.__qualname__, None) is cls
    return f"{next(filter(has, packages), cls.__module__)}:{cls.__qualname__}"


def classes(cls: type[Node] = Node) -> dict[str, type[Node]]:
    """The classes of nodes that this process knows, by name. A name in a file only ever picks one of these."""
    found = {}
    for sub in cls.__subclasses__():
        found |= {class_name(sub): sub, **classes(sub)}
    return found


def complete(x: Any, parameter: Any) -> Any:
    """What was built of one parameter's JSON, over what stands at its place in a base tree."""
    if not isinstance(x, Leaf):
        return parameter
    if is_form(x) and isinstance(parameter, Leaf):
        return parameter
    return x.rebuild(complete(x.original, parameter) if isinstance(x.original, Leaf) else parameter)
