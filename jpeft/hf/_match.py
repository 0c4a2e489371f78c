"""A checkpoint against a model: the tensors that each parameter is read from, and everything that does not fit."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._names import NOTHING, Architecture, Index, outputs, parts, places, to_theirs
from ._safetensors import Tensor


@dataclasses.dataclass(frozen=True)
class Source:
    """What a parameter is read from: for every index of its stacked axes the tensors that are joined there."""

    shape: tuple[int, ...]
    dtype: np.dtype
    letters: str
    parts: Mapping[Index, list[tuple[Tensor, slice]]]

    @property
    def depth(self) -> int:
        """How many first axes are stacked."""
        return len(next(iter(self.parts)))

    def read(self, index: Index) -> np.ndarray:
        """The part at `index`, in memory that JAX on a CPU takes as it is."""
        x = _aligned(self.shape[self.depth :], self.dtype)
        for tensor, at in self.parts[index]:
            tensor.read_into(to_theirs(outputs(x, at), self.letters))
        return x


def _aligned(shape: tuple[int, ...], dtype: np.dtype, to: int = 64) -> np.ndarray:
    """An array whose memory begins at a multiple of `to` bytes."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + to, np.uint8)
    start = -memory.ctypes.data % to
    return memory[start : start + size].view(dtype).reshape(shape)


def match(
    architecture: Architecture,
    model: Any,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    stored: Mapping[str, Tensor],
    *,
    dtype: Any = None,
    head: str = NOTHING,
) -> tuple[dict[str, Source], list[str]]:
    """The source of every parameter in `shapes`, and the paths of those that match `head` and have none.

    **Raises** `ValueError` with all tensors that are missing, unexpected, or of another shape or type.
    """
    found = places(architecture.rows(model), shapes)
    wanted = {path: parts(place, shapes[path].shape) for path, place in found.items()}
    names = {path: [name for group in groups.values() for name in group] for path, groups in wanted.items()}
    tensors, faults = _named(architecture, stored, {name for group in names.values() for name in group})
    module = lambda path: path.rpartition("/")[0]
    held = {module(path) for path in names if tensors.keys() & set(names[path])}
    new = [path for path in names if re.fullmatch(head, path) and module(path) not in held]
    faults += [f"no row says which tensors make up {path}" for path in shapes if path not in found]
    faults += [f"missing: {name}" for path in names if path not in new for name in names[path] if name not in tensors]
    sources = {}
    for path, groups in wanted.items():
        if not all(name in tensors for name in names[path]):
            continue
        letters, shape = found[path].row.letters, shapes[path].shape
        source = Source(shape, np.dtype(dtype or tensors[names[path][0]].dtype), letters, {
            index: [(tensors[name], at) for name, at in group.items()] for index, group in groups.items()
        })  # fmt: skip
        sources[path] = source
        faults += _misfits(source, [tensors[name] for name in names[path]], cast=dtype is not None)
    if faults:
        raise ValueError("\n  ".join(["The tensors do not fit the model of config.json:", *sorted(faults)]))
    return sources, new


def _misfits(source: Source, tensors: list[Tensor], *, cast: bool) -> list[str]:
    """The tensors of a parameter whose shape or type it cannot have."""
    core = np.broadcast_to(np.int8(0), source.shape[source.depth :])  # takes no memory
    faults = []
    for group in source.parts.values():
        for tensor, at in group:
            shape = to_theirs(outputs(core, at), source.letters).shape
            if tensor.shape != shape:
                faults.append(f"shape: {tensor.name} is {tensor.shape}, expected {shape}")
    for tensor in tensors:
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            faults.append(f"dtype: {tensor.name} is {tensor.dtype}, expected floating-point numbers")
        elif not cast and tensor.dtype != source.dtype and jnp.issubdtype(source.dtype, jnp.floating):
            faults.append(f"dtype: {tensor.name} is {tensor.dtype}, {tensors[0].name} {source.dtype}: pass `dtype=...`")
        elif not cast and jax.dtypes.canonicalize_dtype(tensor.dtype) != tensor.dtype:
            faults.append(f"dtype: {tensor.name} is {tensor.dtype}, which JAX has not enabled: pass `dtype=...`")
    return faults


def _named(
    architecture: Architecture, stored: Mapping[str, Tensor], wanted: set[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by the names that rows have for them, and faults: those that nothing asks for."""
    tensors: dict[str, Tensor] = {}
    spare: dict[str, Tensor] = {}
    faults = []
    for name, tensor in stored.items():
        known = _spellings(architecture, name)
        of_rows = next((x for x in known if x in wanted), None)
        tied = next((x for x in known if x in architecture.tied), None)
        if of_rows and of_rows not in tensors:
            tensors[of_rows] = tensor
        elif tied and not of_rows:
            spare[tied] = tensor
        elif of_rows or not any(re.fullmatch(architecture.ignored, x) for x in known):
            faults.append(f"unexpected: {name}")
    for name, tensor in spare.items():
        other = tensors.setdefault(architecture.tied[name], tensor)
        if not _equal(tensor, other):
            faults.append(f"tied: {tensor.name} differs from {other.name}: the model of config.json has one for both")
    return tensors, faults


def _spellings(architecture: Architecture, name: str) -> tuple[str, str, str]:
    """A tensor's name as today's, and with and without the prefix that models with a head give it."""
    for pattern, replacement in architecture.aliases.items():
        name = re.sub(pattern, replacement, name)
    return name, architecture.prefix + name, name.removeprefix(architecture.prefix)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same to the bit."""
    same = a.shape == b.shape and a.dtype == b.dtype
    return a is b or (same and np.array_equal(a.read().view(np.uint8), b.read().view(np.uint8)))
