"""Labelled texts: reading, sharing out, tokenizing, batching."""

import dataclasses
import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jpeft.cli._batches import Batches
from jpeft.cli._errors import UserError
from jpeft.cli._rows import convert, read_objects


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

    Raises a UserError for a file that cannot be read or is empty, and for all lines that are no such row.
    """
    return [example for _, example in convert(path, read_objects(path), _example)]


def _example(row: dict[str, Any]) -> Example:
    if not row.keys() >= {"text", "label"}:
        raise ValueError(f'not a row {{"text": ..., "label": ...}}: {str(row)[:80]}')
    text, label = row["text"], row["label"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'"text" must be a text that is not empty, not {text!r}')
    if not isinstance(label, str | int):
        raise ValueError(f'"label" must be a text or an integer, not {label!r}')
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


class Texts(Batches):
    """Tokenized examples, cut to `max_length` tokens."""

    def __init__(self, examples: Sequence[Example], labels: Sequence[str], tokenizer: "Tokenizer", max_length: int):
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length)
        number = {label: index for index, label in enumerate(labels)}
        self.tokens = [encoding.ids for encoding in tokenizer.encode_batch([example.text for example in examples])]
        self.labels = np.array([number[example.label] for example in examples], np.int32)
        super().__init__([len(tokens) for tokens in self.tokens], max_length)

    def batch(self, rows: Sequence[int], size: int) -> Batch:
        filled = np.resize(rows, size)
        tokens = np.zeros((size, self.length(filled)), np.int32)
        mask = np.zeros_like(tokens)
        for row, index in enumerate(filled):
            tokens[row, : len(self.tokens[index])] = self.tokens[index]
            mask[row, : len(self.tokens[index])] = 1
        return Batch(tokens, mask, self.labels[filled], (np.arange(size) < len(rows)).astype(np.float32))
