"""Samples side by side in rows of one length."""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jpeft.cli._batches import Batches
from jpeft.cli._samples import Sample
from jpeft.models._loss import IGNORED


class Packed(NamedTuple):
    """Integers (batch, length), and `weights` (batch,): how many tokens of a row count in the loss.

    `segment_ids` number the samples of a row from 1 on, and are 0 at padding.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    segment_ids: np.ndarray
    weights: np.ndarray


class Sequences(Batches):
    """Rows of at most `max_length` tokens: with as many samples as there is room for, or, not packed, with one."""

    def __init__(self, samples: Sequence[Sample], max_length: int, *, packed: bool):
        self.samples = samples
        lengths = [len(sample.tokens) for sample in samples]
        self.rows = pack(lengths, max_length) if packed else [[n] for n in range(len(samples))]
        self.tokens = sum(lengths)
        super().__init__([sum(lengths[n] for n in row) for row in self.rows], max_length)

    def batch(self, rows: Sequence[int], size: int) -> Packed:
        filled = np.resize(rows, size)
        shape = size, self.length(filled)
        tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        batch = Packed(tokens, np.full(shape, IGNORED, np.int32), segments, np.zeros(size, np.float32))
        for place, row in enumerate(filled):
            start = 0
            for number, sample in enumerate((self.samples[n] for n in self.rows[row]), start=1):
                end = start + len(sample.tokens)
                here = place, slice(start, end)
                batch.input_ids[here] = sample.tokens
                batch.segment_ids[here] = number
                if place < len(rows):
                    batch.labels[here] = np.where(sample.counted, sample.tokens, IGNORED)
                    batch.weights[place] += np.sum(sample.counted)
                start = end
        return batch


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """The numbers of the samples in every row: the longest first, each where it leaves the least room."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is left in a row, and its number; sorted
    for n in np.argsort([-length for length in lengths], kind="stable"):
        at = bisect.bisect_left(room, (lengths[n], 0))
        left, row = room.pop(at) if at < len(room) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(int(n))
        bisect.insort(room, (left - lengths[n], row))
    return rows
