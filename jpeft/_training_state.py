"""What a step of training leaves: its arrays, by name, and the manifest that tells what they belong to."""

import importlib.metadata
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._expressions import Stacked
from ._manifest import class_name, constants, differences, kept, pointer
from ._node import Node, Role, is_node
from ._storage import CheckpointError, Json, dumps, record
from ._tree import Params, combine, map_nodes


KEY = "key"
VERSIONS = "jpeft", "jax", "flax", "optax", "orbax-checkpoint"


class TreeMismatchError(CheckpointError):
    """The trees are not those that were saved: other nodes, static fields, names, shapes or dtypes, or another base."""


class TrainingState:
    """What trains in `params` and what its nodes hold besides, `opt_state` and `key`; and the base they stand on.

    Leaves that are to be restored may be `jax.ShapeDtypeStruct`s.

    **Raises** `TypeError`, with every path, for leaves that are no arrays; `ValueError` for two of one name.
    """

    def __init__(self, params: Params, opt_state: Any, key: jax.Array | None = None):
        which = kept(params)
        pick = lambda wanted: jax.tree.map(lambda mark, x: x if mark == wanted else None, which, params)
        self._of_base = pick(False)
        self._tree = {"params": pick(True), "opt_state": opt_state, KEY: key}
        self.leaves = _named(self._tree)
        self._nodes = _nodes(map_nodes(lambda x: x.on(None), params, Stacked))  # which of them act is for calls to say
        kinds = jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct
        if wrong := [f"  {n}, {type(x).__name__}" for n, x in self.leaves.items() if not isinstance(x, kinds)]:
            raise TypeError("Only arrays can be saved and restored, as `jnp.asarray` makes them:\n" + "\n".join(wrong))

    @property
    def arrays(self) -> dict[str, Any]:
        """The arrays to be stored: of keys, what `jax.random.key_data` returns."""
        return {name: jax.random.key_data(x) if _is_key(x) else x for name, x in self.leaves.items()}

    def manifest(self) -> dict[str, Json]:
        """What tells this state from others, and its arrays from damaged ones."""
        keys = {name: {"impl": str(jax.random.key_impl(x))} for name, x in self.leaves.items() if _is_key(x)}
        arrays = {n: _described(self.leaves[n]) | record(x) | keys.get(n, {}) for n, x in self.arrays.items()}
        versions = {name: importlib.metadata.version(name) for name in VERSIONS}
        return {"nodes": self._nodes, "base": self._base(), "arrays": arrays, "versions": versions}

    def check(self, saved: dict[str, Json], what: str) -> None:
        """**Raises** `TreeMismatchError` with all in which a saved state differs, but for what training changes."""
        arrays = {name: x for name, x in saved["arrays"].items() if name != KEY}
        given = {name: _described(x) for name, x in self.leaves.items() if name != KEY}
        faults = [
            *differences(_shown(saved["nodes"], _node), _shown(self._nodes, _node)),
            *differences(_shown(saved["base"], _bits), _shown(self._base(), _bits)),
            *differences(_shown(arrays, _kind), _shown(given, _kind)),
        ]
        if faults:
            lines = "".join(f"\n  {fault}" for fault in faults)
            raise TreeMismatchError(f"{what} is of other trees than these, in {len(faults)} places:{lines}")

    def targets(self, saved: dict[str, Json]) -> dict[str, Any]:
        """For every array that was saved, what to read it as: one of NumPy, or the parts of a process's devices."""
        return {name: _target(x, self.leaves.get(name)) for name, x in saved["arrays"].items()}

    def restored(self, saved: dict[str, Json], arrays: dict[str, Any]) -> tuple[Params, Any, jax.Array | None]:
        """`params`, `opt_state` and `key` of the arrays that were read, each with the sharding of the leaf given."""
        entries = saved["arrays"].items()
        found = {name: _placed(arrays[name], x.get("impl"), self.leaves.get(name)) for name, x in entries}
        tree = jax.tree_util.tree_map_with_path(lambda path, _: found[pointer(path)], self._tree | {KEY: None})
        return combine(tree["params"], self._of_base), tree["opt_state"], found.get(KEY)

    def _base(self) -> dict[str, Json]:
        return {name: _record_once(x) for name, x in _named(self._of_base).items()}


def _named(tree: Any) -> dict[str, Any]:
    leaves = [(pointer(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]
    names = [name for name, _ in leaves]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Two arrays would be stored under one name: {', '.join(twice)}. Rename one of each.")
    return dict(leaves)


def _nodes(tree: Any, inside: str = "") -> dict[str, Json]:
    """The class and the static fields of every node, by name, those that others stand on too."""
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_node):
        if isinstance(x, Node):
            name = inside + pointer(path)
            found[name] = {"is": class_name(type(x)), "static": constants(x, name)}
            found |= _nodes(x.parts(Role.TRAINABLE, Role.FROZEN), f"{name}/")
    return found


_KNOWN: dict[int, tuple[weakref.ref, Json]] = {}


def _record_once(x: Any) -> Json:
    """The record of a frozen array, which is the same in every step."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return {"shape": list(x.shape), "dtype": f"abstract {x.dtype}", "sum": None}
    if not isinstance(x, jax.Array):
        return record(x)
    at = id(x)
    of, found = _KNOWN.get(at, (None, None))
    if of is None or of() is not x:
        found = record(x)
        _KNOWN[at] = weakref.ref(x, lambda _: _KNOWN.pop(at, None)), found
    return found


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _described(x: Any) -> dict[str, Json]:
    if not _is_key(x):
        return {"shape": list(x.shape), "dtype": str(x.dtype)}
    data = jax.eval_shape(jax.random.key_data, x)
    return {"shape": list(data.shape), "dtype": str(data.dtype), "key": str(x.dtype)}


def _shown(entries: dict[str, Json], show: Any) -> dict[str, str]:
    return {name: show(x) for name, x in entries.items()}


def _node(x: dict[str, Json]) -> str:
    return f"{x['is']} {dumps(x['static'])}"


def _kind(x: dict[str, Json]) -> str:
    return f"{x.get('key', x['dtype'])} {tuple(x['shape'])}"


def _bits(x: dict[str, Json]) -> str:
    return f"{_kind(x)} with the checksum {x['sum']}"


def _sharding(x: Any) -> Any:
    """Where the leaf is; `None` where it is wherever JAX puts what is on no device in particular."""
    return getattr(x, "sharding", None) if getattr(x, "committed", True) else None


def _target(saved: dict[str, Json], like: Any) -> Any:
    shape, dtype, sharding = saved["shape"], jnp.dtype(saved["dtype"]), _sharding(like)
    if sharding is None or sharding.is_fully_addressable:
        return np.empty(shape, dtype)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _placed(x: Any, impl: str | None, like: Any) -> jax.Array:
    x = jnp.asarray(x) if impl is None else jax.random.wrap_key_data(jnp.asarray(x), impl=impl)
    sharding = _sharding(like)
    return x if sharding is None else jax.device_put(x, sharding)
