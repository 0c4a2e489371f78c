"""A model and its parameters: to a directory that transformers loads."""

import dataclasses
import itertools
import json
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict

from .._node import Reparam, is_param, value
from .._shared import SHARED
from .._targets import named_leaves
from .._tree import merge
from ..quantized._codes import Codes
from . import architectures
from ._atomic import whole
from ._load import parameter_shapes
from ._names import Architecture, Index, outputs, parts, places, to_theirs
from ._progress import progress
from ._repository import file
from ._safetensors import most_common, write


if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What belongs to a tokenizer and the talk with a model, in a directory.
TEXT_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json", "preprocessor_config.json",
)  # fmt: skip


def save(
    directory: str | Path,
    model: nn.Module,
    params: Any,
    *,
    tokenizer: "Tokenizer | str | Path | None" = None,
    overwrite: bool = False,
    shard_size: int = 5 * 10**9,
) -> None:
    """Write `config.json` and `model.safetensors`, as transformers reads them.

    Nodes are merged, and quantized kernels are written as the numbers that they stand for, in the type that they had:
    each when its turn comes. Every other type stays as it is, and a table that two modules share is written once.
    The directory is written beside, and takes its place when it is whole.

    **Arguments:**

    - `tokenizer`: that of `load`, or a directory whose tokenizer, chat template and generation config are copied.
    - `overwrite`: replace a model that is at `directory`, with everything beside it there.
    - `shard_size`: bytes of tensors above which there are several files, with an index. As much memory is taken.

    **Warns** of quantized kernels: what their rounding lost is not found again.

    **Raises** `FileExistsError` for what is there already, `FileNotFoundError` for a tokenizer's directory that is not
    there, and `ValueError`, all at once, for parameters that the model does not have, lacks or has in another shape,
    and for nodes that act on activations.
    """
    architecture = _architecture(model)
    plain = jax.eval_shape(lambda params: jax.tree.map(value, merge(params), is_leaf=is_param), params)
    shapes = flatten_dict(plain, sep="/")
    pieces = _pieces(architecture, model, shapes)
    if quantized := [path for path, x in named_leaves(params).items() if _quantized(x)]:
        first = f"{quantized[0]} in {shapes[quantized[0]].dtype}"
        message = f"{len(quantized)} kernels are quantized; the numbers that they stand for are written, {first}."
        warnings.warn(message, stacklevel=2)
    shards, total = _shards(pieces, shard_size), sum(piece.nbytes for piece in pieces)
    with whole(directory, mark="config.json", overwrite=overwrite) as new, progress("Writing", total) as advance:
        for name, shard in shards.items():
            write(new / name, _arrays(shard, params))
            advance(sum(piece.nbytes for piece in shard))
        if len(shards) > 1:
            files = {piece.name: name for name, shard in shards.items() for piece in shard}
            _write_json(new / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": files})
        _write_json(new / "config.json", architecture.fields(model) | {"dtype": str(most_common(pieces))})
        _write_tokenizer(new, tokenizer)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A tensor of the file, and where it is: outputs `at` of the part `index` of the parameter at `path`."""

    name: str
    path: str
    index: Index
    at: slice
    letters: str
    dtype: np.dtype
    nbytes: int


def _architecture(model: nn.Module) -> Architecture:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in architectures.ARCHITECTURES:
        known = ", ".join(sorted(architectures.ARCHITECTURES))
        raise ValueError(f"A {type(model).__name__} of model_type {model_type!r} cannot be written; known: {known}.")
    return architectures.ARCHITECTURES[model_type]


def _pieces(
    architecture: Architecture, model: nn.Module, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> list[_Piece]:
    """The tensors of the file, those of a parameter together."""
    own = parameter_shapes(architecture, model)
    found = places(architecture.rows(model), own)
    faults = [f"missing: {path}" for path in own if path not in shapes]
    faults += [f"unexpected: {path}" for path in shapes if path not in own]
    faults += [f"no row says which tensors make up {path}" for path in own if path not in found]
    faults += [f"shape: {path} is {shapes[path].shape}, expected {x.shape}" for path, x in own.items()
               if path in shapes and shapes[path].shape != x.shape]  # fmt: skip
    if faults:
        raise ValueError("\n  ".join(["These are not the parameters of this model:", *sorted(faults)]))
    pieces = []
    for path, place in found.items():
        x = np.broadcast_to(np.zeros((), shapes[path].dtype), shapes[path].shape)  # takes no memory
        for index, group in parts(place, x.shape).items():
            for name, at in group.items():
                part = outputs(x[index], at)
                pieces.append(_Piece(name, path, index, at, place.row.letters, part.dtype, part.size * part.itemsize))
    return pieces


def _quantized(x: Any) -> bool:
    while isinstance(x, Reparam):
        x = x.base
    return isinstance(x, Codes)


def _shards(pieces: Iterable[_Piece], limit: int) -> dict[str, list[_Piece]]:
    """The pieces by the name of their file: each file is filled until the next piece would exceed the limit."""
    files: list[list[_Piece]] = [[]]
    room = limit
    for piece in pieces:
        if files[-1] and piece.nbytes > room:
            files.append([])
            room = limit
        files[-1].append(piece)
        room -= piece.nbytes
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{n:05}-of-{len(files):05}.safetensors": pieces for n, pieces in enumerate(files, 1)}


def _arrays(shard: Iterable[_Piece], params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of a file. Nodes of one of the outermost modules are merged at a time."""
    arrays = {}
    for name, pieces in itertools.groupby(shard, key=lambda piece: piece.path.partition("/")[0]):
        merged = merge({name: params[name], SHARED: params.get(SHARED, {})})
        plain = flatten_dict(jax.tree.map(value, merged, is_leaf=is_param), sep="/")
        for piece in pieces:
            part = outputs(np.asarray(plain[piece.path])[piece.index], piece.at)
            arrays[piece.name] = to_theirs(part, piece.letters)
    return arrays


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n")


def _write_tokenizer(directory: Path, tokenizer: "Tokenizer | str | Path | None") -> None:
    if isinstance(tokenizer, str | Path):
        if not Path(tokenizer).is_dir():
            raise FileNotFoundError(f"{tokenizer} is no directory that a tokenizer could be copied from.")
        for source in filter(None, (file(Path(tokenizer), name) for name in TEXT_FILES)):
            shutil.copyfile(source, directory / source.name)
    elif tokenizer is not None:
        tokenizer.save(str(directory / "tokenizer.json"))
