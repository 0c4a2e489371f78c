"""Files of tensors: what is in them, and one tensor at a time.

The `safetensors` library refuses a file whose header is too long, too deep or not as the format has it, and tensors
that overlap, leave holes, end beyond the file or have another size than their shape. It does not see two tensors of
one name, nor what names and sizes no tensor of a model has, and its NumPy reader knows no 8-bit floats; its memory map,
besides, counts as the process' own memory. So it checks the file, and we its header; the bytes of a tensor are read
plainly.
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ._errors import FormatError
from ._extra import extra
from ._repository import file, foreign, parse, read_json


DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F16": "float16",
    "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
}  # fmt: skip


LONGEST_HEADER = 16 * 2**20  # bytes
NAME = re.compile(r"[A-Za-z0-9_.-]{1,512}")
ENTRY = {"dtype", "shape", "data_offsets"}
MOST_AXES, LARGEST = 8, 2**60  # of a tensor: axes, and bytes where no axis is empty

BLOCK, ROWS = 2**16, 16  # bytes, and rows of a matrix, that are read at once at least


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file."""

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int  # of its first byte in the file

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The array. **Raises** `FormatError` if the file has become shorter."""
        x = np.empty(self.shape, self.dtype)
        self.read_into(x)
        return x

    def read_into(self, x: np.ndarray) -> None:
        """Fill `x`, of the tensor's shape but any type and order in memory, some rows at a time."""
        with self.path.open("rb") as stream:
            stream.seek(self.offset)
            for block in _blocks(x if self.shape else x[None], self.dtype.itemsize):
                data = np.fromfile(stream, self.dtype, block.size)
                if data.size != block.size:
                    raise FormatError(f"{self.path} ends within {self.name}: it has become shorter.")
                block[...] = data.reshape(block.shape)


def _blocks(x: np.ndarray, itemsize: int) -> Iterator[np.ndarray]:
    """All of `x` as views of some rows each.

    They are few: where `x` is transposed in memory, those that are written together then share the cache's lines.
    """
    row = max(1, x[:1].size * itemsize)
    if x.ndim > 2 and row > BLOCK:
        yield from itertools.chain.from_iterable(_blocks(part, itemsize) for part in x)
        return
    step = max(ROWS, BLOCK // row)
    yield from (x[start : start + step] for start in range(0, len(x), step))


def tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, by name.

    **Raises** `FormatError` for a file that is damaged or not of this format, and, all at once, for types that JAX does
    not have and for names and shapes that no tensor of a model has.
    """
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
    if size > LONGEST_HEADER:
        raise FormatError(f"{path} is damaged, or no safetensors file: its header has {size} bytes.")
    safetensors = extra("safetensors")
    try:
        with safetensors.safe_open(path, "numpy"):
            pass
    except safetensors.SafetensorError as error:
        raise FormatError(f"{path} is damaged, or no safetensors file: {error}") from error
    with path.open("rb") as stream:
        stream.seek(8)
        header = parse(stream.read(size), path)
    header.pop("__metadata__", None)
    faults = [f"{name!r}: {fault}" for name, x in header.items() if (fault := _fault(name, x))]
    if faults:
        raise FormatError("\n  ".join([f"{path} has tensors that are not supported:", *faults]))
    return {
        name: Tensor(name, path, tuple(x["shape"]), jnp.dtype(DTYPES[x["dtype"]]), 8 + size + x["data_offsets"][0])
        for name, x in header.items()
    }


def _fault(name: str, entry: dict[str, Any]) -> str:
    """What is wrong with a tensor that a header describes."""
    if not NAME.fullmatch(name):
        return "its name must be of letters, digits and _.-"
    if entry.keys() != ENTRY:
        return f"it has fields beyond {', '.join(sorted(ENTRY))}"
    if entry["dtype"] not in DTYPES:
        return f"its type is {entry['dtype']}"
    if len(entry["shape"]) > MOST_AXES or 8 * math.prod(max(n, 1) for n in entry["shape"]) > LARGEST:
        return f"its shape is {entry['shape']}"
    return ""


def checkpoint(directory: Path) -> dict[str, Tensor]:
    """The tensors of a model's directory, by name: of `model.safetensors`, or of the files that an index names.

    **Raises** `FileNotFoundError` for a directory without such files, and `FormatError` for an index that names files
    out of the directory or does not tell what is in them, with everything that differs.
    """
    if path := file(directory, "model.safetensors"):
        return tensors(path)
    index = read_json(directory, "model.safetensors.index.json")
    if index is None:
        raise FileNotFoundError(f"{directory} has no model.safetensors, nor an index of several.{foreign(directory)}")
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise FormatError(f"{directory / 'model.safetensors.index.json'} has no weight_map of names to files.")
    shards = {name: file(directory, name) for name in sorted(set(places.values()))}
    if absent := [name for name, path in shards.items() if path is None]:
        raise FileNotFoundError(f"{directory} lacks files that its index names: {', '.join(absent)}.")
    found = {name: tensors(path) for name, path in shards.items() if path}
    faults = [f"  {name} is not in {shard}" for name, shard in places.items() if name not in found[shard]]
    faults += [f"  {name} is in {shard}, unmentioned" for shard, own in found.items() for name in own
               if places.get(name) != shard]  # fmt: skip
    if faults:
        raise FormatError("\n".join([f"{directory}: the index does not tell what is in its files:", *faults]))
    return {name: found[shard][name] for name, shard in places.items()}


def most_common(tensors: Iterable[Any]) -> np.dtype:
    """The floating-point type that most of what has a `dtype` and `nbytes` is of, by bytes; float32 if nothing is."""
    sizes: collections.Counter = collections.Counter({np.dtype(np.float32): 0})
    for tensor in tensors:
        if jnp.issubdtype(tensor.dtype, jnp.floating):
            sizes[tensor.dtype] += tensor.nbytes
    return sizes.most_common(1)[0][0]


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a file as transformers does."""
    dense = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    extra("safetensors.numpy").save_file(dense, path, metadata={"format": "pt"})
