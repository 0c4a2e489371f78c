"""What a compiled program sends between its devices."""

import math
import re
from collections import defaultdict
from typing import NamedTuple


class Collective(NamedTuple):
    """What one device takes part in during a call of a program, of one kind and dtype.

    **Fields:**

    - `kind`: `"all-gather"`, `"all-reduce"`, `"reduce-scatter"`, `"all-to-all"`, `"collective-permute"`.
    - `dtype`: of what is sent, in XLA's names: `"u8"`, `"bf16"`.
    - `count`: how often, where each turn of a loop counts.
    - `bytes`: the sum of the arrays' sizes: what comes of a gather, what goes into a scatter, what is reduced.
    """

    kind: str
    dtype: str
    count: int
    bytes: int


_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLS = re.compile(r"\b(?:calls|to_apply|body|branch_computations|true_computation|false_computation"
                    r"|called_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))")  # fmt: skip


def collectives(hlo: str) -> list[Collective]:
    """Those of an optimized program, `jax.jit(f).lower(...).compile().as_text()`, by kind and dtype.

    A collective that is started, carried on and ended in several places is one: they share a channel. A loop makes as
    many turns as it is known to, or as the constant says that its counter, from 0 on, is compared with.
    """
    computations, entry = _computations(hlo)
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, turns: int) -> None:
        times[name] += turns
        for line in computations.get(name, ()):
            for callee in _callees(line):
                visit(callee, turns * (_turns(line, computations) if " while(" in line else 1))

    visit(entry, 1)
    found: dict[tuple[str, str], tuple[str, str, int, int]] = {}
    for name, turns in times.items():
        sizes = {}
        for line in computations.get(name, ()):
            label, result, op, rest = _LINE.match(line).groups()
            sizes[label] = _arrays(result)
            kind = op.removesuffix("-done")
            if not re.fullmatch(_KINDS, kind):
                continue
            arrays = sizes[label]
            if kind == "reduce-scatter":
                inputs = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
                arrays = [a for i in inputs for a in sizes[i]]
            elif name.startswith("all-reduce-scatter"):  # how the compiler for TPUs writes it
                kind = "reduce-scatter"
            channel = re.search(r"channel_id=(\d+)", rest)
            key = (kind, channel[1] if channel else f"{name}/{label}")
            size = math.ceil(sum(bits for _, bits in arrays) / 8)
            if key not in found or found[key][2] < turns:
                found[key] = (kind, max(arrays, key=lambda a: a[1])[0], turns, size)
    sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for kind, dtype, turns, size in found.values():
        sums[kind, dtype][0] += turns
        sums[kind, dtype][1] += turns * size
    return [Collective(*key, *total) for key, total in sorted(sums.items())]


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation, and the name of that which is called first."""
    found: dict[str, list[str]] = {}
    entry, inside = "", None
    for line in hlo.splitlines():
        if head := _HEAD.match(line):
            inside = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            inside = None
        elif inside is not None and _LINE.match(line):
            inside.append(line)
    return found, entry


def _callees(line: str) -> list[str]:
    """The computations that an instruction calls, but not those that combine two numbers in a reduction."""
    if re.search(r" (all-reduce|reduce-scatter|reduce|reduce-window|scatter|sort|select-and-scatter)(-start)?\(", line):
        return []
    names = [many or one for many, one in _CALLS.findall(line)]
    return [name.strip().lstrip("%") for group in names for name in group.split(",") if name.strip()]


def _turns(line: str, computations: dict[str, list[str]]) -> int:
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    condition = computations.get(re.search(r"condition=%?([\w.\-]+)", line)[1], [])
    constants = [int(n) for text in condition for n in re.findall(r" constant\((\d+)\)", text)]
    return constants[0] if len(constants) == 1 else 1


def _arrays(result: str) -> list[tuple[str, int]]:
    """The dtype and the bits of every array of a result."""
    return [(dtype, math.prod(map(int, filter(None, shape.split(",")))) * _bits(dtype))
            for dtype, shape in _ARRAY.findall(result)]  # fmt: skip


def _bits(dtype: str) -> int:
    return int(found[0]) if (found := re.search(r"\d+", dtype)) else 8
