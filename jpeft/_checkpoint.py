"""Checkpoints: what trains, and what rebuilds it over a base."""

import importlib.metadata
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from ._expressions import Stacked
from ._manifest import build, complete, describe, differences, keys, kind, pointer
from ._node import Additive, is_param, sharding, whole
from ._sharding import put, shardings
from ._shared import SHARED, resolve
from ._storage import CheckpointError, Json, dumps, read, understood, write
from ._tree import Params, map_nodes, shared_arrays, strip


class BaseMismatchError(CheckpointError):
    """The base is not the one that the checkpoint was trained on."""


def save(path: str | os.PathLike, params: Params, *, overwrite: bool = False) -> int:
    """Write all that trains, and what is needed to rebuild it over its base; return the bytes on disk.

    Of a node, what the base tells is left out: its kernel, quantized or not. Other frozen arrays, such as random
    projections, are kept. Of the base itself there are checksums.

    **Arguments:**

    - `path`: a directory, made if there is none.
    - `overwrite`: whether a checkpoint that is there may be replaced. It stays whole until the new one is.

    **Raises** `FileExistsError` for a checkpoint that is there without `overwrite`, and for a directory that holds
    anything else; `ValueError` if there is nothing but the base; `TypeError` for a node that holds something other than
    arrays, numbers, strings and dtypes.
    """
    params = map_nodes(lambda x: x.on(None), params, Stacked)  # which of several adapters act is for calls to say
    shared, arrays = shared_arrays(params), {}
    parameters, beside = {}, {}
    for name, x in _named(params).items():
        if isinstance(x, Additive) or name.startswith(f"{SHARED}/"):
            beside[name] = describe(x, name, arrays, of_base=False)
        else:
            parameters[name] = _shape(resolve(x, shared)) | {"is": describe(x, name, arrays, of_base=True)}
    if not any(map(np.size, arrays.values())):
        raise ValueError("There is nothing in this tree but its base. Apply a method first: `jpeft.lora(params)`.")
    content = {"jpeft": importlib.metadata.version("jpeft"), "parameters": parameters, "beside": beside}
    return write(Path(path).absolute(), arrays, content, overwrite=overwrite)


def restore(path: str | os.PathLike, base_params: Params, *, check_base: bool = True) -> Params:
    """The tree that was saved at `path`, over a base: the same nodes, bits and dtypes.

    **Arguments:**

    - `base_params`: the base. Its parameters must have the names, shapes and dtypes that they had; kernels that were
      quantized must be so again, as `jpeft.nf4(params)` makes them. Other nodes give way to their bases.
    - `check_base`: whether the base must have the same bits, wherever nothing that trained takes its place.

    **Raises** `FileNotFoundError` if there is nothing at `path`; `CheckpointError` for a checkpoint that is damaged, a
    base of other names, shapes or dtypes, with every difference, and nodes of a class that is not imported;
    `BaseMismatchError` for a base of other bits.
    """
    directory = Path(path).absolute()
    manifest, arrays = read(directory)
    base = strip(base_params)
    with understood(directory):
        params = _restored(manifest, arrays, base, check_base)
    return _divided(params, base)


def _restored(manifest: dict[str, Json], arrays: dict[str, jax.Array], base: Params, check_base: bool) -> Params:
    parameters, beside = manifest["parameters"], manifest["beside"]
    _check_shapes(parameters, {name: _shape(x) for name, x in _named(base).items()})
    nodes = _nodes({name: entry["is"] for name, entry in parameters.items()} | beside, arrays)
    params = jax.tree_util.tree_map_with_path(lambda p, x: complete(nodes[pointer(p)], x), base, is_leaf=is_param)
    _check_forms(params)
    if check_base:
        _check_base(parameters, nodes, params)
    for name in beside:
        *modules, last = keys(name)
        module = params
        for key in modules:
            module = module.setdefault(key, {})
        module[last] = nodes[name]
    return params


def _divided(params: Params, base: Params) -> Params:
    """What was read, where `shardings` says: the base, and what was made of it, stay where they are."""
    over = jax.tree.map(sharding, base, is_leaf=is_param)
    if len(jax.tree.leaves(over)) < len(_named(base)):
        return params  # a base that is on no mesh
    on_mesh = lambda x: isinstance(getattr(x, "sharding", None), NamedSharding)
    return jax.tree.map(lambda x, to: x if on_mesh(x) else put(x, to), params, shardings(params, over))


def _named(params: Params) -> dict[str, Any]:
    """Everything that stands in the tree, by `pointer`."""
    return {pointer(path): x for path, x in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_param)}


def _shape(x: Any) -> dict[str, Json]:
    parameter = whole(x)
    return {"shape": list(parameter.shape), "dtype": str(parameter.dtype)}


def _lines(faults: Iterable[str]) -> str:
    return "".join(f"\n  {fault}" for fault in faults)


def _nodes(entries: dict[str, Json], arrays: dict[str, jax.Array]) -> dict[str, Any]:
    """What stood at every name, without its base."""
    found, unknown = {}, set()
    for name, entry in entries.items():
        try:
            found[name] = build(entry, arrays)
        except KeyError as e:
            unknown.add(e.args[0])
        except TypeError as e:
            raise CheckpointError(f"{name}: its class has other fields than when it was saved. {e}") from e
    if unknown:
        modules = sorted({name.partition(":")[0] for name in unknown})
        raise CheckpointError(
            f"The checkpoint has nodes of classes that are not known here: {', '.join(sorted(unknown))}. Import what "
            f"defines them first: {'; '.join(f'import {module}' for module in modules)}. Nothing is imported by a file."
        )
    return found


def _check_shapes(saved: dict[str, Json], given: dict[str, Json]) -> None:
    show = lambda entries: {name: f"{x['dtype']} {tuple(x['shape'])}" for name, x in entries.items()}
    if faults := differences(show(saved), show(given)):
        what = f"This base is of another model than the checkpoint, in {len(faults)} parameters:"
        raise CheckpointError(what + _lines(faults))


def _check_forms(params: Params) -> None:
    """That every kernel is there which the base should have had as codes: it alone cannot tell how those were made."""
    absent = lambda x: any(isinstance(a, jax.ShapeDtypeStruct) for a in jax.tree.leaves(x))
    faults = [f"{name}, {kind(x)}" for name, x in _named(params).items() if absent(x)]
    if faults:
        raise CheckpointError(
            f"{len(faults)} kernels were quantized when this was saved, and are not in this base. Quantize it as it "
            "was, for example `jpeft.restore(path, jpeft.nf4(base_params))`:" + _lines(faults)
        )


def _check_base(saved: dict[str, Json], nodes: dict[str, Any], params: Params) -> None:
    faults = []
    for name, x in _named(params).items():
        if dumps(saved[name]["is"]) != dumps(describe(x, name, {}, of_base=True)):
            then, now = kind(nodes[name]), kind(x)
            faults.append(f"{name}, {now}" if then == now else f"{name}, {then} when saved, {now} now")
    if faults:
        raise BaseMismatchError(
            f"{len(faults)} of {len(saved)} parameters of this base are not those that the checkpoint was trained on. "
            "Give its own base, or pass `check_base=False` if you mean to use another:" + _lines(faults)
        )
