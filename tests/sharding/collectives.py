"""What a compiled program moves between devices."""

import collections
import math
import re

import jax.numpy as jnp


SIZES = {"c64": 8, "pred": 1, "u8": 1, "s8": 1, "u32": 4, "s32": 4, "f32": 4, "bf16": 2, "f16": 2}
KINDS = "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"
MOVES = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")


def collectives(compiled):
    """`{kind: Counter of "dtype[shape]"}` of the results of a compiled program's collective operations."""
    found = {kind: collections.Counter() for kind in KINDS}
    for results, kind, _ in MOVES.findall(compiled.as_text()):
        found[kind].update(re.findall(r"\w+\[[\d,]*\]", results))
    return {kind: shapes for kind, shapes in found.items() if shapes}


def size(shapes):
    """The bytes of arrays such as `"f32[8,16]"`."""

    def one(shape):
        dtype, _, sizes = shape.partition("[")
        return SIZES[dtype] * math.prod(map(int, re.findall(r"\d+", sizes)))

    return sum(one(shape) * count for shape, count in shapes.items())


assert size({"f32[8,16]": 2, "u8[3]": 1, "f32[]": 1}) == 2 * 8 * 16 * jnp.dtype("float32").itemsize + 3 + 4
