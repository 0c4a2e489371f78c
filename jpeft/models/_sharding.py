"""Which axes of the models' parameters belong together, and how a mesh of devices divides them."""

import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._mesh import batch_axes
from .._targets import name_of


Names = tuple[str | None, ...]

# A parameter's path, and what its last axes are; the first pattern that matches tells. Others are on every device.
RULES: tuple[tuple[str, Names], ...] = (
    (r"(.*/)?(embed|word|shared)/embedding", ("vocab", "embed")),
    (r"lm_head/kernel", ("embed", "vocab")),
    (r"(.*/)?(query|key|value|qkv)/kernel", ("embed", "heads")),
    (r"(.*/)?(query|key|value|qkv)/bias", ("heads",)),
    (r"(.*/)?\w*attention/out/kernel", ("heads", "embed")),
    (r"(.*/)?(gate|up|gate_up)/kernel", ("embed", "mlp")),
    (r"(.*/)?(gate|up|gate_up)/bias", ("mlp",)),
    (r"(.*/)?down/kernel", ("mlp", "embed")),
    (r"(.*/)?experts/gate_up", ("experts", "embed", "mlp")),
    (r"(.*/)?experts/down", ("experts", "mlp", "embed")),
)

# What divides them: the axes of a mesh, as they are mostly called. "data" divides the batch, and no parameter.
AXES = {"embed": "fsdp", "vocab": "tensor", "heads": "tensor", "mlp": "tensor", "experts": "expert"}


def along_batch(x: jax.Array) -> jax.Array:
    """Hidden states `(batch, ...)`, divided along the batch and nothing else, by the mesh of `jax.set_mesh`, if any.

    A mesh's axes that divide parameters and the batch would otherwise have XLA choose between them, layer by layer.
    """
    axes, _ = batch_axes(len(x))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes)) if axes else x


def for_whole_batch(params: Any, module: tuple[str, ...]) -> Any:
    """A module's parameters, gathered along `embed`: what XLA does itself, but within a loop in every turn of it."""

    def one(path, x):
        names = logical_axes("/".join((*module, name_of(path).rpartition("/")[2])), x.ndim)
        spec = [None if name == "embed" else PartitionSpec.UNCONSTRAINED for name in names]
        return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(one, params)


def logical_axes(path: str, ndim: int) -> Names:
    """What the axes of the parameter at `path` are: `("embed", "heads")`; `None` for those that nothing divides.

    Axes before those are of layers, stacked by a scan: nothing divides them.
    """
    names = next((names for pattern, names in RULES if re.fullmatch(pattern, path)), ())
    return (None,) * (ndim - len(names)) + names


def shardings(params: Any, mesh: Mesh, *, axes: Mapping[str, str] = AXES) -> Any:
    """A `NamedSharding` for every parameter of a tree of arrays, or of their shapes.

    **Arguments:**

    - `mesh`: its axes may be called `"fsdp"`, `"tensor"`, `"expert"`, and `"data"`, which divides no parameter. They
      are taken as automatic ones, also where `jax.make_mesh` has made them explicit: the models leave it to XLA.
    - `axes`: what the axes of a mesh are called that divide `embed`, `vocab`, `heads`, `mlp` and `experts`.

    An axis whose size is no multiple of the devices is not divided.

    **Raises** `ValueError` for a mesh none of whose axes divides anything.
    """
    if not {*axes.values(), "data"} & set(mesh.axis_names):
        raise ValueError(
            f"The mesh has the axes {mesh.axis_names}, which divide no parameter. Call them 'data', 'fsdp', 'tensor' "
            f"or 'expert', or tell: axes={{'embed': {mesh.axis_names[0]!r}}}; there are {', '.join(AXES)}."
        )

    mesh = Mesh(mesh.devices, mesh.axis_names)

    def one(path, x):
        spec: list[str | None] = []
        for name, size in zip(logical_axes(name_of(path), len(x.shape)), x.shape, strict=True):
            axis = axes.get(name) if name else None
            fits = axis in mesh.axis_names and axis not in spec and size % mesh.shape[axis] == 0
            spec.append(axis if fits else None)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(one, params)
