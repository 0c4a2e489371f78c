"""A tree of ours as transformers' modules: by which name an adapter knows a parameter, or a part of one."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from .._kernel import IN, OUT, STACK
from .._node import whole
from ._names import CANONICAL, Index, Place, Row, parts, places, to_ours, to_theirs


@dataclasses.dataclass(frozen=True)
class Module:
    """A parameter in their modules, and where it is in ours.

    **Fields:**

    - `parameter`: its name, `model.layers.0.self_attn.q_proj.weight`.
    - `letters`, `shape`: of its axes in torch, as in `Row`; those of a table are `"io"`.
    - `path`, `axes`: of our parameter, and the letters that a node at it has.
    - `index`: its place on the stacked axes of ours: a layer, and an expert.
    - `at`: from which to which of our outputs it is, where ours joins several; else `None`.
    """

    parameter: str
    letters: str
    shape: tuple[int, ...]
    path: str
    axes: str
    index: Index = ()
    at: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """Of the module that has it, `model.layers.0.self_attn.q_proj`; of experts the parameter's own."""
        return self.parameter if self.experts else self.parameter.rpartition(".")[0]

    @property
    def owner(self) -> str:
        """The path of the module of ours that has the parameter."""
        return self.path.rpartition("/")[0]

    @property
    def is_weight(self) -> bool:
        """Whether it is a kernel or a table, to which adapters are put."""
        return OUT in self.letters

    @property
    def is_bias(self) -> bool:
        return self.path.endswith("bias")

    @property
    def is_table(self) -> bool:
        return self.path.endswith("embedding")

    @property
    def transposed(self) -> bool:
        """Whether torch, too, has it as `(in, out)`: the module is GPT-2's `Conv1D`."""
        return self.letters == "io" and not self.is_table

    @property
    def inputs(self) -> int:
        return math.prod(self._sizes("ihw"))

    @property
    def channels(self) -> int:
        """Its inputs at one position of the window."""
        return math.prod(self._sizes("i"))

    @property
    def outputs(self) -> int:
        return math.prod(self._sizes("o"))

    @property
    def window(self) -> tuple[int, ...]:
        return self._sizes("hw")

    @property
    def experts(self) -> tuple[int, ...]:
        return self._sizes("e")

    def _sizes(self, letters: str) -> tuple[int, ...]:
        return tuple(n for n, c in zip(self.shape, self.letters, strict=True) if c in letters) if self.letters else ()

    def of(self, x: np.ndarray) -> np.ndarray:
        """The part of our array that this parameter is, with axes as ours; a view."""
        return x[self.index] if self.at is None else x[self.index][..., slice(*self.at)]

    def take(self, x: np.ndarray) -> np.ndarray:
        """This parameter, as torch has it, of the array that ours is."""
        return to_theirs(self.of(x), self.letters)

    def put(self, x: np.ndarray, tensor: np.ndarray) -> None:
        """Write a tensor of torch's shape into the array that ours is."""
        self.of(x)[...] = to_ours(tensor, self.letters)


def modules(rows: Iterable[Row], leaves: Mapping[str, Any]) -> tuple[list[Module], list[Module]]:
    """Every parameter of a tree under the name that today's transformers have for it, a stacked one once a layer.

    They are in the order of the rows. And those under another name, by which files had them: an old adapter knows
    experts one by one.
    """
    today: list[Module] = []
    former: list[Module] = []
    rows = list(rows)
    order = {row: n for n, row in reversed([*enumerate(rows)])}
    for path, place in sorted(places(rows, leaves).items(), key=lambda pair: order[pair[1].row]):
        shape = whole(leaves[path]).shape
        files = list(_files(path, place, shape))
        if place.row.module == place.row.files[0]:
            today += files
        else:
            today += _whole(path, place, shape)
            former += files
    return today, former


def _whole(path: str, place: Place, shape: tuple[int, ...]) -> Iterator[Module]:
    """A parameter that their modules have as ours do: joined, and of all experts."""
    letters = "e" * ("{e}" in place.row.files[0]) + _letters(place.row, path, shape)
    for layer in range(shape[0]) if place.stacked else [place.layer]:
        index = (layer,) if place.stacked else ()
        yield _module(place.row.module.replace("{i}", str(layer)), letters, shape, path, index)


def _files(path: str, place: Place, shape: tuple[int, ...]) -> Iterator[Module]:
    """A parameter by its tensors in files."""
    letters = _letters(place.row, path, shape)
    for index, joined in parts(place, shape).items():
        for name, at in joined.items():
            yield _module(name, letters, shape, path, index, None if len(joined) == 1 else (at.start, at.stop))


def _letters(row: Row, path: str, shape: tuple[int, ...]) -> str:
    return row.letters or ("io" if path.endswith("embedding") and len(shape) == 2 else "")


def _module(name: str, letters: str, ours: tuple[int, ...], path: str, index: Index, at: Any = None) -> Module:
    shape = ours[len(index) :]
    if at is not None:
        shape = (*shape[:-1], at[1] - at[0])
    order = [c for c in CANONICAL if c in letters]
    axes = "".join({"e": STACK, "o": OUT}.get(c, IN) for c in order)
    if letters:
        shape = tuple(shape[order.index(c)] for c in letters)
    return Module(name, letters, shape, path, STACK * len(index) + axes, index, at)
