"""The formats, and what is promised of each."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

import jpeft


class Format(NamedTuple):
    quantize: Callable  # a transform of trees
    group: int | None  # how many weights share a constant: all of a column, if `None`
    bits: Callable[[int], float]  # of a weight, for so many inputs
    half_gap: Callable  # the least and the greatest weight of a group -> the greatest error of one

    def node(self, w, axes="io"):
        """The node in place of the kernel `w`."""
        return self.quantize({"kernel": w}, targets={"kernel": axes})["kernel"]


def absmax(low, high):
    return np.maximum(high, -low)


HALF = (1 - 0.6961928009986877) / 2  # of the widest gap between two levels of NF4

EXACT = {
    "int8": Format(jpeft.int8(), None, lambda inputs: 8 + 32 / inputs, lambda low, high: absmax(low, high) / 254),
    "int8-32": Format(jpeft.int8(group=32), 32, lambda inputs: 9, lambda low, high: absmax(low, high) / 254),
    "int4": Format(jpeft.int4(), 64, lambda inputs: 4.5, lambda low, high: np.maximum(high / 14, -low / 16)),
    "int4-asymmetric": Format(
        jpeft.int4(group=32, symmetric=False),
        32,
        lambda inputs: 4 + 40 / 32,
        lambda low, high: (np.maximum(high, 0) - np.minimum(low, 0)) / 30,
    ),
    "nf4-single": Format(jpeft.nf4(double=False), 64, lambda inputs: 4.5, lambda low, high: HALF * absmax(low, high)),
}
NF4 = Format(jpeft.nf4(), 64, lambda inputs: 4 + 8 / 64 + 32 / (64 * 256), lambda low, high: HALF * absmax(low, high))
FORMATS = EXACT | {"nf4": NF4}
