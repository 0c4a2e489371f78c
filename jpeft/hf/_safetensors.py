"""Files of tensors: what is in them, and one tensor at a time.

The `safetensors` library refuses a file whose header is too long, too deep or not as the format has it, and tensors
that overlap, leave holes, end beyond the file or have another size than their shape. It does not see two tensors of
one name, and its NumPy reader knows no 8-bit floats; its memory map, besides, counts as the process' own memory. So it
checks the file; the bytes of a tensor are read plainly.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ._extra import extra
from ._repository import file, parse, read_json


DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F16": "float16",
    "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
}  # fmt: skip


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
        """The array. **Raises** `ValueError` if the file has become shorter."""
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
                    raise ValueError(f"{self.path} ends within {self.name}: it has become shorter.")
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

    **Raises** `ValueError` for a file that is damaged or not of this format, and for types that JAX does not have.
    """
    safetensors = extra("safetensors")
    try:
        with safetensors.safe_open(path, "numpy"):
            pass
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = parse(stream.read(size), path)
    header.pop("__metadata__", None)
    unknown = [f"{name} ({x['dtype']})" for name, x in header.items() if x["dtype"] not in DTYPES]
    if unknown:
        raise ValueError(f"{path} has tensors of types that are not supported: {', '.join(unknown[:8])}.")
    return {
        name: Tensor(name, path, tuple(x["shape"]), jnp.dtype(DTYPES[x["dtype"]]), 8 + size + x["data_offsets"][0])
        for name, x in header.items()
    }


def checkpoint(directory: Path) -> dict[str, Tensor]:
    """The tensors of a model's directory, by name: of `model.safetensors`, or of the files that an index names.

    **Raises** `FileNotFoundError` for a directory without such files, and `ValueError` for an index that names files
    out of the directory or does not tell what is in them, with everything that differs.
    """
    if path := file(directory, "model.safetensors"):
        return tensors(path)
    index = read_json(directory, "model.safetensors.index.json")
    if index is None:
        raise FileNotFoundError(_no_model(directory))
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{directory / 'model.safetensors.index.json'} has no weight_map of names to files.")
    shards = {name: file(directory, name) for name in sorted(set(places.values()))}
    if absent := [name for name, path in shards.items() if path is None]:
        raise FileNotFoundError(f"{directory} lacks files that its index names: {', '.join(absent)}.")
    found = {name: tensors(path) for name, path in shards.items() if path}
    faults = [f"  {name} is not in {shard}" for name, shard in places.items() if name not in found[shard]]
    faults += [f"  {name} is in {shard}, unmentioned" for shard, own in found.items() for name in own
               if places.get(name) != shard]  # fmt: skip
    if faults:
        raise ValueError("\n".join([f"{directory}: the index does not tell what is in its files:", *faults]))
    return {name: found[shard][name] for name, shard in places.items()}


def most_common(tensors: Iterable[Any]) -> np.dtype:
    """The floating-point type that most of what has a `dtype` and `nbytes` is of, by bytes; float32 if nothing is."""
    sizes: collections.Counter = collections.Counter({np.dtype(np.float32): 0})
    for tensor in tensors:
        if jnp.issubdtype(tensor.dtype, jnp.floating):
            sizes[tensor.dtype] += tensor.nbytes
    return sizes.most_common(1)[0][0]


def _no_model(directory: Path) -> str:
    message = f"{directory} has no model.safetensors, nor an index of several."
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickles:
        message += (
            f" It has {', '.join(pickles[:4])}: pickles, which run any code that is in them, and are never read here. "
            "Convert it where you trust it: transformers.AutoModel.from_pretrained(directory).save_pretrained(new)."
        )
    return message


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a file as transformers does."""
    dense = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    extra("safetensors.numpy").save_file(dense, path, metadata={"format": "pt"})
