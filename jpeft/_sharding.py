"""How the arrays of a tree of nodes are divided over devices: as the parameters that they belong to."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ._division import DATA_AXES, Division, replicated
from ._node import Additive, Leaf, Matrix, Node, is_param, sharding, whole
from ._shared import SHARED
from ._targets import name_of
from ._tree import Params


def shardings(
    params: Params,
    base_shardings: Any = None,
    *,
    mesh: Mesh | None = None,
    rules: Sequence[tuple[str, Any]] | None = None,
    adapter_sharding: Literal["tensor", "inherit"] = "tensor",
    data_axes: Collection[str] = DATA_AXES,
) -> Params:
    r"""A `NamedSharding` for every array of `params`: in the tree's own structure, as `jax.jit` takes it.

    A kernel `P(i, o)` has factors $A$ `P(i', None)` and $B$ `P(None, o')`. Arrays of a kernel's size, and the codes and
    constants of a quantized one, are divided as the kernel, which they stand for. What is stacked over layers or
    experts is divided over these as the kernel is. Shared arrays are whole on every device, and so is what stands
    beside a module, but for axes that are the inputs or outputs of the module's kernel.

    **Arguments:**

    - `params`: arrays, or their `jax.ShapeDtypeStruct`s.
    - `base_shardings`: a `NamedSharding`, or with `mesh` a `PartitionSpec`, for every parameter of the base, in a tree
      with its paths, such as `jpeft.models.shardings(base, mesh)`. Left out: those that the arrays have.
    - `mesh`, `rules`: the parameters are in boxes of logical axis names, `nn.with_logical_partitioning`, and these
      rules name the axes of the mesh that divide them. Instead of `base_shardings`.
    - `adapter_sharding`: `"tensor"` leaves $i'$, $o'$ the axes that are not `data_axes`: no adapter is gathered in a
      step, on any mesh. `"inherit"` is $i' = i$, $o' = o$: less memory for adapters and their optimizer, and gathers.
    - `data_axes`: the axes of a mesh that divide the batch.

    **Raises** `ValueError`, with every path, for parameters without a sharding, and for a quantized kernel that would
    be cut within a group of weights which share a constant.
    """
    if adapter_sharding not in ("tensor", "inherit"):
        raise ValueError(f"adapter_sharding is 'tensor' or 'inherit', not {adapter_sharding!r}.")
    data = data_axes if adapter_sharding == "tensor" else ()
    paths, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_param)
    leaves = {name_of(path): x for path, x in paths}
    own = {name: x for name, x in leaves.items() if not isinstance(x, Additive) and not name.startswith(f"{SHARED}/")}
    given = _given(own, base_shardings, mesh, rules)
    apart = Division(replicated(next(iter(given.values())).mesh))
    of = {name: Division.of(given[name], whole(x).shape, _letters(x), data) for name, x in own.items()}
    made, faults = [], []
    for name, x in leaves.items():
        kernel = f"{name.rpartition('/')[0]}/kernel".lstrip("/") if isinstance(x, Additive) else name
        division = of.get(kernel, apart)
        try:
            made.append(x.divided(division) if isinstance(x, Node) else division.each(x))
        except ValueError as e:
            faults.append(f"  {name}, {type(x).__name__}: {e}")
    if faults:
        raise ValueError("These cannot be divided as their parameters are:\n" + "\n".join(faults))
    return tree.unflatten(made)


def shard(params: Params, shardings: Params, *, data_axes: Collection[str] = DATA_AXES) -> Params:
    """Every array of `params` where `shardings` says: a new one, or a `jax.ShapeDtypeStruct` of a `ShapeDtypeStruct`.

    The arrays may be donated: none of them is one of `params`. In a program of many processes, each gives the whole
    array, and keeps its own part.

    The nodes of quantized kernels are told, too: where a kernel is divided along axes of data, a product gathers the
    codes and constants, and not the weights that they stand for.
    """
    moved = jax.tree.map(put, params, shardings)
    division = lambda x: Division.of(sharding(x), whole(x).shape, _letters(x), data_axes)
    told = lambda x: x.told(division(x)) if isinstance(x, Leaf) else x
    return jax.tree.map(told, moved, is_leaf=is_param)


def _given(params: Mapping[str, Any], found: Any, mesh: Mesh | None, rules: Any) -> dict[str, NamedSharding]:
    """The sharding of every parameter, by path."""
    if rules is not None:
        found = {name: _by_rules(x, mesh, rules) for name, x in params.items()}
    elif found is None:
        found = {name: sharding(x) for name, x in params.items()}
    else:
        entries = jax.tree_util.tree_leaves_with_path(found, is_leaf=lambda x: isinstance(x, PartitionSpec))
        found = {name_of(path): x for path, x in entries}
    in_mesh = lambda x: NamedSharding(mesh, x) if isinstance(x, PartitionSpec) and mesh is not None else x
    found = {name: in_mesh(found.get(name)) for name in params}
    if missing := [name for name, x in found.items() if not isinstance(x, NamedSharding)]:
        raise ValueError(
            f"{len(missing)} parameters have no `NamedSharding`: {', '.join(missing[:8])}. Give `base_shardings`, a "
            "tree with the paths of the base, as `jpeft.models.shardings(base, mesh)` returns; or place the arrays."
        )
    return found


def _by_rules(x: Any, mesh: Mesh | None, rules: Any) -> Any:
    while isinstance(x, Leaf):
        x = x.original
    names = x.names if isinstance(x, nn.Partitioned) else ()
    return nn.logical_to_mesh_axes(names, rules)


def _letters(x: Any) -> str:
    return x.axes if isinstance(x, Matrix) else ""


def put(x: Any, to: NamedSharding) -> Any:
    """A new array there, of which each of many processes keeps its own part; or its `jax.ShapeDtypeStruct`."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to)
    if to.is_fully_addressable or not x.is_fully_addressable:
        return jax.device_put(jnp.copy(x), to)  # with `may_alias=False`, too, it may return the array itself
    host = np.asarray(x)
    return jax.make_array_from_callback(x.shape, to, lambda part: host[part])
