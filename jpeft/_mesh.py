"""What is computed on a mesh of devices, and left to XLA or said to it."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ._division import DATA_AXES
from ._shim import vary


def constrained(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """`x`, divided so; as it is, where that is not left to XLA: inside of a `shard_map`, on explicit axes."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes or (sharding.mesh if mesh.empty else mesh).explicit_axes:
        return x
    return jax.lax.with_sharding_constraint(x, sharding if mesh.empty else sharding.spec)


def undivided(x: jax.Array) -> jax.Array:
    """`x`, whole on every device of the mesh of `jax.set_mesh`, if there is one."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(x, PartitionSpec()) if mesh.auto_axes and not mesh.manual_axes else x


def batch_axes(batch: int) -> tuple[tuple[str, ...], int]:
    """The axes of the mesh of `jax.set_mesh` that divide a batch, and into how many parts."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in DATA_AXES if axis in mesh.auto_axes)
    parts = math.prod(mesh.shape[axis] for axis in axes)
    return ((), 1) if batch % parts else (axes, parts)


def by_rows(fn: Callable[..., jax.Array], x: jax.Array, *others: Any) -> jax.Array:
    """`fn(x, *others)`, of which each row needs the same row of `x` alone; computed where the rows are.

    By the mesh of `jax.set_mesh`, as the batch is divided; axes that do not divide it compute the same. Without this,
    XLA gathers the operands of a Fourier transform on every device.
    """
    axes = batch_axes(x.shape[0])[0] if x.ndim > 1 else ()
    if not axes or jax.sharding.get_abstract_mesh().manual_axes:
        return fn(x, *others)
    rows = PartitionSpec(axes)
    on_rows = lambda x, others: fn(x, *vary(others, axes))
    return jax.shard_map(on_rows, in_specs=(rows, PartitionSpec()), out_specs=rows)(x, others)


def everywhere(like: Any) -> jax.ShapeDtypeStruct:
    """The type of `like`, for an array that is whole on every device."""
    return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=NamedSharding(like.sharding.mesh, PartitionSpec()))


def automatic(fn: Callable, *args: Any, like: Any) -> Any:
    """`fn(*args)`, an array, with the sharding that is part of the type of `like`, of its shape.

    On a mesh with explicit axes every operation must say how its result is divided. Formulas of nodes do not: within
    them XLA chooses, as on automatic axes.
    """
    to = like.sharding
    if to is None or not to.mesh.explicit_axes:
        return fn(*args)
    return jax.sharding.auto_axes(fn, out_sharding=to)(*args)


def placed(fn: Callable, *args: Any, to: Callable[[Any], Any]) -> Any:
    """`fn(*args)`, a tree of arrays, divided as `to` tells of it by `NamedSharding`s; computed on automatic axes."""
    mesh = explicit_mesh(args)
    if mesh is None:
        out = fn(*args)
        return jax.lax.with_sharding_constraint(out, to(out))
    automatic = _automatic(mesh)
    with jax.sharding.use_abstract_mesh(automatic):
        out = fn(*_resharded(args, automatic))
    back = lambda x, sharding: jax.sharding.reshard(x, NamedSharding(mesh, sharding.spec))
    return jax.tree.map(back, out, to(out))


def around(node: Any, call: Callable, key: Any, args: tuple, kwargs: dict) -> Any:
    """`node.around(call, key, *args, **kwargs)`: the node is computed on automatic axes, and `call` as without it.

    What goes into `call`, and what comes out in the end, is divided as it was before the node was there.
    """
    mesh = explicit_mesh((args, kwargs))
    if mesh is None:
        return node.around(call, key, *args, **kwargs)
    before = _specs((args, kwargs))
    after: Any = None

    @functools.wraps(call)
    def explicit(*args, **kwargs):
        nonlocal after
        with jax.sharding.use_abstract_mesh(mesh):
            args, kwargs = _resharded((args, kwargs), mesh, before)
            out = call(*args, **kwargs)
            after = _specs(out)
        return _resharded(out, automatic)

    automatic = _automatic(mesh)
    with jax.sharding.use_abstract_mesh(automatic):
        node, key, args, kwargs = _resharded((node, key, args, kwargs), automatic)
        out = node.around(explicit, key, *args, **kwargs)
    return _resharded(out, mesh, after)


def sharding_of(x: Any) -> Any:
    """An array's sharding, or that of a `jax.ShapeDtypeStruct`; `None` where it is not known."""
    if isinstance(x, jax.core.Tracer):
        found = jax.typeof(x).sharding
        return found if found.mesh.explicit_axes else None
    return getattr(x, "sharding", None)


def explicit_mesh(x: Any) -> Any:
    """The mesh that the types of arrays in `x` tell of; `None` where its axes are automatic, or there is none."""
    meshes = (jax.typeof(a).sharding.mesh for a in jax.tree.leaves(x) if isinstance(a, jax.Array))
    return next((mesh for mesh in meshes if mesh.explicit_axes), None)


def _automatic(mesh: Any) -> Any:
    return mesh.update_axis_types(dict.fromkeys(mesh.explicit_axes, AxisType.Auto))


def _specs(tree: Any) -> dict[Any, PartitionSpec]:
    """How the types of the arrays say that they are divided, by their place and how many axes they have."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {(path, x.ndim): jax.typeof(x).sharding.spec for path, x in leaves if isinstance(x, jax.Array)}


def _resharded(tree: Any, mesh: Any, specs: Any = None) -> Any:
    """The arrays on a mesh of other types of axes; divided along explicit ones as `specs` says, if it does."""

    def one(path, x):
        if not isinstance(x, jax.Array):
            return x
        spec = (specs or {}).get((path, x.ndim), PartitionSpec(*[None] * x.ndim))
        return jax.sharding.reshard(x, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(one, tree)
