"""The order in which rows are seen, and their batches of few shapes."""

import abc
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


class Batches(abc.ABC):
    """Rows of `lengths`, in batches that are as long as the smallest of five parts of `max_length` allows.

    A batch is a named tuple of arrays with the rows on their first axis. What counts in its loss, row by row, is
    `weights`.
    """

    def __init__(self, lengths: Sequence[int], max_length: int):
        self.lengths = tuple(sorted({math.ceil(share * max_length) for share in (1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)}))
        self._bucket = np.searchsorted(self.lengths, lengths)

    @abc.abstractmethod
    def batch(self, rows: Sequence[int], size: int) -> Any:
        """The given rows, filled up to `size` by repeating them with weight 0."""

    def __len__(self) -> int:
        return len(self._bucket)

    def steps(self, size: int) -> int:
        """The batches of an epoch."""
        return -(-len(self) // size)

    def length(self, rows: Sequence[int]) -> int:
        """That of the batch of these rows."""
        return self.lengths[self._bucket[rows].max()]

    def train_batch(self, step: int, size: int, seed: int) -> Any:
        """The batch of a step, a function of the arguments alone: an interrupted run goes on with the same batches.

        Every epoch sees every row, in batches of like lengths, in an order of its own.
        """
        epoch, index = divmod(step, self.steps(size))
        return self.batch(self._epoch(epoch, size, seed)[index], size)

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def _epoch(self, epoch: int, size: int, seed: int) -> np.ndarray:
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(len(self))
        order = order[np.argsort(self._bucket[order], kind="stable")]
        return rng.permutation(np.resize(order, (self.steps(size), size)))

    def all_batches(self, size: int) -> Iterator[tuple[np.ndarray, Any]]:
        """Every row once: the rows' numbers and their batch."""
        order = np.argsort(self._bucket, kind="stable")
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            yield rows, self.batch(rows, size)
