"""Names: which tensors of a Hugging Face checkpoint a parameter of ours is made of, and how its axes lie there.

One table serves checkpoints and adapters, in and out. Layers are numbered `{i}`, experts `{e}`: of one row for all.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


# The axes of our arrays, in this order: experts, height, width, inputs, outputs. Torch has them in another.
CANONICAL = "ehwio"

NOTHING = r"(?!)"  # a pattern that matches nothing
TOKEN_IDS = jax.ShapeDtypeStruct((1, 1), jnp.int32)


@dataclasses.dataclass(frozen=True)
class Row:
    """A parameter of ours and what it is made of.

    **Fields:**

    - `ours`: its path, `layers_{i}/attention/query/kernel`.
    - `files`: the tensors in a checkpoint's files; several are joined along their outputs, or, where `{e}` stands in
      them, each is stacked over the experts first.
    - `letters`: of the axes of a tensor: `"oi"` for torch's `Linear`, `"io"` for GPT-2's `Conv1D`, `"oihw"` for a
      convolution, `""` for what lies as ours does.
    - `module`: the parameter in transformers' own modules, by which adapters name it; left out, that of the file.
    - `sizes`: of the outputs of each of several files; left out, they are equal.
    """

    ours: str
    files: tuple[str, ...]
    letters: str = ""
    module: str = ""
    sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.module:
            object.__setattr__(self, "module", self.files[0])


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What is to be known of a `model_type`.

    **Fields:**

    - `build`: `(fields of config.json, **options) -> model`. Raises a `ValueError` that names every field which is not
      understood, or whose value the model does not have. Options: `scan`, `remat`, `dtype`, `param_dtype`, `head`,
      `num_labels`, `fused`, whichever the model has.
    - `rows`: of all of a model's parameters; those of parameters that a model has not are not asked for.
    - `fields`: the `config.json` of a model, as transformers reads it.
    - `prefix`: what a checkpoint of a bare model leaves out before its tensors' names, `"model."` or `"bert."`.
    - `ignored`: a pattern of tensors in files that hold nothing to load: buffers.
    - `aliases`: names of old files -> today's, patterns and replacements for `re.sub`.
    - `tied`: tensors that a file may hold twice -> the name that a row has for them: `"lm_head.weight"` of a model
      without a head of its own. Where a model has a row for the first, too, it is a tensor like others.
    - `head`: a pattern of our parameters that a task adds: only these may a file lack, if the caller names a task.
    - `inputs`: what the model is called with, by name, to find out its parameters.
    """

    build: Callable[..., nn.Module]
    rows: Callable[[nn.Module], tuple[Row, ...]]
    fields: Callable[[nn.Module], dict[str, Any]]
    prefix: str = ""
    ignored: str = NOTHING
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    head: str = NOTHING
    inputs: Callable[[nn.Module], dict[str, jax.ShapeDtypeStruct]] = lambda model: {"input_ids": TOKEN_IDS}


def linear(ours: str, *theirs: str, letters: str = "oi", module: str = "") -> tuple[Row, Row]:
    """The rows of a linear map: its kernel and its bias, if it has one."""
    weights, biases = (tuple(f"{name}.{end}" for name in theirs) for end in ("weight", "bias"))
    at = lambda end: f"{module}.{end}" if module else ""
    return Row(f"{ours}/kernel", weights, letters, at("weight")), Row(f"{ours}/bias", biases, module=at("bias"))


def norm(ours: str, theirs: str) -> tuple[Row, Row]:
    """The rows of a norm: its scale, and its bias if it has one."""
    return Row(f"{ours}/scale", (f"{theirs}.weight",)), Row(f"{ours}/bias", (f"{theirs}.bias",))


def table(ours: str, theirs: str) -> tuple[Row]:
    """The row of an embedding."""
    return (Row(f"{ours}/embedding", (f"{theirs}.weight",)),)


def to_ours(x: np.ndarray, letters: str) -> np.ndarray:
    """A tensor of a checkpoint with its axes in our order; a view."""
    return np.transpose(x, [letters.index(c) for c in CANONICAL if c in letters]) if letters else x


def to_theirs(x: np.ndarray, letters: str) -> np.ndarray:
    """Undo `to_ours`; a view."""
    ours = [c for c in CANONICAL if c in letters]
    return np.transpose(x, [ours.index(c) for c in letters]) if letters else x


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a row puts one parameter: `layer` is `None` where there are no layers, or all of them are stacked."""

    row: Row
    layer: int | None = None
    stacked: bool = False  # whether the parameter has the layers on its first axis


def places(rows: Iterable[Row], paths: Iterable[str]) -> dict[str, Place]:
    """The place of every path that a row names, unrolled (`layers_3/...`) or stacked (`layers/...`)."""
    patterns = []
    for row in rows:
        before, layered, after = row.ours.partition("_{i}")
        layer = r"(?:_(?P<i>\d+))?" if layered else ""
        patterns.append((re.compile(re.escape(before) + layer + re.escape(after)), bool(layered), row))
    found = {}
    for path in paths:
        for pattern, layered, row in patterns:
            if match := pattern.fullmatch(path):
                i = match["i"] if layered else None
                found[path] = Place(row, None if i is None else int(i), layered and i is None)
                break
    return found


Index = tuple[int, ...]


def parts(place: Place, shape: tuple[int, ...]) -> dict[Index, dict[str, slice]]:
    """What a parameter of `shape` consists of: for every index of its stacked axes (layers, then experts), the tensors
    by name, each with the outputs that it has there.

    **Raises** `ValueError` for sizes that do not make up the outputs.
    """
    row, each = place.row, "{e}" in place.row.files[0]
    layers = range(shape[0]) if place.stacked else [place.layer]
    experts = range(shape[place.stacked]) if each else [None]
    found = {}
    for i, e in itertools.product(layers, experts):
        index = tuple(n for n, many in ((i, place.stacked), (e, each)) if many)
        names = [name.replace("{i}", str(i)).replace("{e}", str(e)) for name in row.files]
        found[index] = dict(zip(names, _slices(row, shape), strict=True))
    return found


def outputs(x: np.ndarray, at: slice) -> np.ndarray:
    """The outputs `at` of an array: a view of it, to read or to fill."""
    return x[..., at] if x.ndim else x


def _slices(row: Row, shape: tuple[int, ...]) -> list[slice]:
    if len(row.files) == 1:
        return [slice(None)]
    sizes = row.sizes or (shape[-1] // len(row.files),) * len(row.files)
    if sum(sizes) != shape[-1]:
        raise ValueError(f"{row.ours} has {shape[-1]} outputs, {' + '.join(row.files)} have {sizes}.")
    return [slice(end - size, end) for size, end in zip(sizes, itertools.accumulate(sizes), strict=True)]
