"""Labelled texts: reading, sharing out, tokenizing, batching."""

import dataclasses
import functools
import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jpeft.cli._errors import UserError


if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Example:
    """A text, its label, and the group that must not stand on both sides of a split."""

    text: str
    label: str
    group: str


def read_jsonl(path: Path) -> list[Example]:
    """The rows `{"text": ..., "label": ...}` of a file, one a line; equal texts are a group.

    Raises a UserError for a file that cannot be read or is empty, and, with its number, for the first line that is no
    such row.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise UserError(f"cannot read {path}: {reason}") from error
    examples = [_row(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not examples:
        raise UserError(f"{path} is empty")
    return examples


def _row(path: Path, number: int, line: str) -> Example:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{number}: not JSON: {error}") from error
    if not isinstance(row, dict) or row.keys() < {"text", "label"}:
        raise UserError(f'{path}:{number}: not a row {{"text": ..., "label": ...}}: {line[:80]}')
    text, label = row["text"], row["label"]
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'{path}:{number}: "text" must be a text that is not empty, not {text!r}')
    if not isinstance(label, str | int):
        raise UserError(f'{path}:{number}: "label" must be a text or an integer, not {label!r}')
    return Example(text, str(label), group=text)


def held_out(examples: Sequence[Example], fraction: float, salt: str) -> np.ndarray:
    """A bool for every example: whether it is held out, which at most `fraction` of each label's examples are.

    Groups are held out as a whole, whatever their labels, in the order of a hash of their name and `salt`; nothing else
    decides. At least one group of every label is not.
    """
    groups: dict[str, Counter[str]] = defaultdict(Counter)
    for example in examples:
        groups[example.group][example.label] += 1
    room = {label: fraction * size for label, size in Counter(example.label for example in examples).items()}
    held = set()
    for group in sorted(groups, key=lambda group: hashlib.sha256(f"{salt}/{group}".encode()).digest()):
        if all(size <= room[label] for label, size in groups[group].items()):
            held.add(group)
            for label, size in groups[group].items():
                room[label] -= size
    return np.array([example.group in held for example in examples])


def label_names(train: Sequence[Example], evaluation: Sequence[Example]) -> list[str]:
    """The labels, sorted.

    Raises a UserError for fewer than two, for labels seen only in evaluation, and for an empty evaluation set.
    """
    labels = {example.label for example in train}
    if len(labels) < 2:
        raise UserError(f"classification needs two labels or more; the training texts have only {', '.join(labels)}")
    if unseen := sorted({example.label for example in evaluation} - labels):
        raise UserError(f"labels seen only in evaluation, which cannot be learned: {', '.join(unseen)}")
    if not evaluation:
        raise UserError("too few texts to hold some out for evaluation; give more, or a file of them: --eval-data")
    return sorted(labels)


class Batch(NamedTuple):
    """`tokens` and `mask` (batch, length), `labels` and `weights` (batch,): a row that only fills up has weight 0."""

    tokens: np.ndarray
    mask: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


class Texts:
    """Tokenized examples, cut to `max_length` tokens, in batches of five lengths, so that few shapes are compiled."""

    def __init__(self, examples: Sequence[Example], labels: Sequence[str], tokenizer: "Tokenizer", max_length: int):
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length)
        number = {label: index for index, label in enumerate(labels)}
        self.tokens = [encoding.ids for encoding in tokenizer.encode_batch([example.text for example in examples])]
        self.labels = np.array([number[example.label] for example in examples], np.int32)
        self.lengths = tuple(sorted({math.ceil(share * max_length) for share in (1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)}))
        self._bucket = np.searchsorted(self.lengths, [len(tokens) for tokens in self.tokens])

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, rows: Sequence[int], size: int) -> Batch:
        """The given examples, filled up to `size` rows by repeating them."""
        filled = np.resize(rows, size)
        tokens = np.zeros((size, self.lengths[self._bucket[filled].max()]), np.int32)
        mask = np.zeros_like(tokens)
        for row, index in enumerate(filled):
            tokens[row, : len(self.tokens[index])] = self.tokens[index]
            mask[row, : len(self.tokens[index])] = 1
        return Batch(tokens, mask, self.labels[filled], (np.arange(size) < len(rows)).astype(np.float32))

    def train_batch(self, step: int, size: int, seed: int) -> Batch:
        """The batch of a step, a function of the arguments alone: an interrupted run goes on with the same batches.

        Every epoch sees every example, in batches of like lengths, in an order of its own.
        """
        steps = -(-len(self) // size)
        epoch, index = divmod(step, steps)
        return self.batch(self._epoch(epoch, size, seed)[index], size)

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def _epoch(self, epoch: int, size: int, seed: int) -> np.ndarray:
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(len(self))
        order = order[np.argsort(self._bucket[order], kind="stable")]
        return rng.permutation(np.resize(order, (-(-len(self) // size), size)))

    def all_batches(self, size: int) -> Iterator[tuple[np.ndarray, Batch]]:
        """Every example once: the rows' numbers and their batch."""
        order = np.argsort(self._bucket, kind="stable")
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            yield rows, self.batch(rows, size)
