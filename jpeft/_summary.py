"""What a tree holds, what of it trains, and the memory that this takes."""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import optax

from ._manifest import is_form, kind
from ._node import Additive, Role, is_param, whole
from ._targets import name_of
from ._tree import Params, labels, partition


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter, with the node in its place; or a node beside a module; or several of a kind, in sum."""

    path: str
    kind: str  # `array`, `LoRA(NF4)`, ...
    shape: tuple[int, ...] | None  # of the parameter; `None` for a node beside a module
    trainable: int  # how many numbers train
    total: int  # how many there are; a quantized kernel counts as the kernel that it stands for
    trainable_bytes: int
    frozen_bytes: int
    count: int = 1  # how many parameters or nodes


@dataclasses.dataclass(frozen=True)
class Summary:
    """What trains, and the memory of weights, gradients and optimizer. As text, a table with like layers as one row."""

    rows: tuple[Row, ...]
    optimizer_bytes: int | None  # of the optimizer's state; `None` if no optimizer was given

    @property
    def trainable(self) -> int:
        """How many numbers train."""
        return sum(row.trainable for row in self.rows)

    @property
    def total(self) -> int:
        """How many parameters the model has, with all that was added to it. Quantization does not change it."""
        return sum(row.total for row in self.rows)

    @property
    def percent(self) -> float:
        """How many of a hundred parameters train."""
        return 100 * self.trainable / max(self.total, 1)

    @property
    def weight_bytes(self) -> int:
        """Of all arrays as they are stored: of a quantized kernel the codes and their constants."""
        return sum(row.trainable_bytes + row.frozen_bytes for row in self.rows)

    @property
    def gradient_bytes(self) -> int:
        """Of the gradients: those of what trains, in its dtypes."""
        return sum(row.trainable_bytes for row in self.rows)

    def grouped(self) -> tuple[Row, ...]:
        """The rows, with those that differ in numbers in their paths alone as one: `layers_{0..5}/mlp/up/kernel`."""
        alike: dict[Any, list[Row]] = {}
        for row in self.rows:
            alike.setdefault(dataclasses.replace(row, path=re.sub(r"\d+", "0", row.path)), []).append(row)
        return tuple(joined for rows in alike.values() for joined in _join(rows))

    def __str__(self):
        table = [("parameter", "node", "shape", "trainable", "total", "memory")]
        for row in self.grouped():
            path = f"{row.path}  x{row.count}" if row.count > 1 else row.path
            shape = "" if row.shape is None else str(row.shape)
            trainable = f"{row.trainable:,}" if row.trainable else "-"  # what trains stands out
            memory = human(row.trainable_bytes + row.frozen_bytes)
            table.append((path, row.kind, shape, trainable, f"{row.total:,}", memory))
        table.append(("total", "", "", f"{self.trainable:,}", f"{self.total:,}", human(self.weight_bytes)))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        align = [str.ljust] * 3 + [str.rjust] * 3
        lines = ["  ".join(a(x, w) for a, x, w in zip(align, cells, widths, strict=True)) for cells in table]
        rule = "-" * len(lines[0])
        memory = f"weights {human(self.weight_bytes)}, gradients {human(self.gradient_bytes)}"
        if self.optimizer_bytes is not None:
            memory += f", optimizer {human(self.optimizer_bytes)}"
        trains = f"{self.trainable:,} of {self.total:,} parameters train ({self.percent:.3g}%)"
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], "", trains, f"memory: {memory}"])


def summary(params: Params, tx: optax.GradientTransformation | None = None) -> Summary:
    """What of `params` trains, and the memory of weights, gradients and the state of the optimizer `tx`.

    The trees may be abstract: `jpeft.summary(jax.eval_shape(lambda: jpeft.lora(params)))` takes no memory. Activations
    are not counted. Where arrays are sharded, it is the memory of all devices together.
    """
    params = jax.eval_shape(lambda tree: tree, params)
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_param)
    rows = tuple(_row(name_of(path), x) for path, x in leaves if jax.tree.leaves(x))
    state = None if tx is None else _bytes(jax.tree.leaves(jax.eval_shape(tx.init, partition(params)[0])))
    return Summary(rows, state)


def _row(path: str, x: Any) -> Row:
    marked = list(zip(jax.tree.leaves(labels(x)), jax.tree.leaves(x), strict=True))
    trainable, frozen = ([a for mark, a in marked if mark == role.value] for role in (Role.TRAINABLE, Role.FROZEN))
    total = sum(math.prod(whole(part).shape) for part in jax.tree.leaves(x, is_leaf=is_form))
    shape = None if isinstance(x, Additive) else whole(x).shape
    trains = sum(math.prod(a.shape) for a in trainable)
    return Row(path, kind(x), shape, trains, total, _bytes(trainable), _bytes(frozen))


def _bytes(arrays: Iterable[jax.ShapeDtypeStruct]) -> int:
    opaque = lambda dtype: jax.dtypes.issubdtype(dtype, jax.dtypes.extended)  # of PRNG keys
    bits = lambda dtype: 8 * dtype.itemsize if opaque(dtype) else jax.dtypes.itemsize_bits(dtype)
    return sum(-(-math.prod(a.shape) * bits(a.dtype) // 8) for a in arrays)


def _join(rows: Sequence[Row]) -> list[Row]:
    """As few rows as have whole grids of numbers in their paths, such as all experts of all layers."""
    numbers = [re.findall(r"\d+", row.path) for row in rows]
    axes = [sorted(set(axis), key=int) for axis in zip(*numbers, strict=True)]
    if math.prod(map(len, axes)) == len(rows):
        spans = map(_span, axes)
        path = re.sub(r"\d+", lambda _: next(spans), rows[0].path)
        numeric = ("trainable", "total", "trainable_bytes", "frozen_bytes", "count")
        return [dataclasses.replace(rows[0], path=path, **{f: sum(getattr(row, f) for row in rows) for f in numeric})]
    place, groups = next((p, g) for p in range(len(axes)) if len(g := _alike(numbers, p)) > 1)
    parts = ([row for row, found in zip(rows, numbers, strict=True) if found[place] in group] for group in groups)
    return [joined for part in parts for joined in _join(part)]


def _alike(numbers: Sequence[Sequence[str]], place: int) -> list[list[str]]:
    """The numbers at a place, those together that come with the same others: layers of the same experts."""
    others: dict[str, list[tuple[str, ...]]] = {}
    for found in numbers:
        others.setdefault(found[place], []).append((*found[:place], *found[place + 1 :]))
    groups: dict[Any, list[str]] = {}
    for number, rest in others.items():
        groups.setdefault(frozenset(rest), []).append(number)
    return list(groups.values())


def _span(numbers: Sequence[str]) -> str:
    """Ascending numbers as `3`, or `{0..2,5}`."""
    if len(numbers) == 1:
        return numbers[0]
    runs: list[list[str]] = []
    for n in numbers:
        if runs and int(n) == int(runs[-1][-1]) + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return "{" + ",".join(run[0] if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs) + "}"


def human(n: float) -> str:
    """A number of bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"
