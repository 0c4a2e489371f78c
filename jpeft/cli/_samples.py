"""What a causal model learns from: rows of text as tokens, of which some count in the loss."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from jpeft.cli._errors import UserError
from jpeft.cli._rows import convert, read_objects
from jpeft.hf._chat import ChatTemplate, load_chat_template, special_tokens, stop_tokens


KINDS = {"text": ("text",), "completion": ("prompt", "completion"), "messages": ("messages",)}
_FORMS = '{"prompt": ..., "completion": ...}, {"messages": [{"role": ..., "content": ...}, ...]} or {"text": ...}'

Spans = Iterable[tuple[int, int]]  # of characters: start and end


class Sample(NamedTuple):
    """Tokens (length,), which of them count in the loss, and the group that must not stand on both sides of a split."""

    tokens: np.ndarray
    counted: np.ndarray
    group: str


class Samples(NamedTuple):
    """Those of a file, how many of its rows were cut, and how many samples had nothing to learn left."""

    kept: list[Sample]
    cut: int
    dropped: int


@dataclasses.dataclass(frozen=True)
class Reader:
    """A checkpoint's tokenizer and chat template, and whether all tokens count or only the model's own words.

    `stops` are the tokens that end an answer; `end` is written where none of them does. `vocabulary` is how many tokens
    the model has: a tokenizer may have some more, such as those of images.
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    stops: tuple[int, ...]
    end: int
    vocabulary: int
    count_all: bool = False

    @classmethod
    def of(cls, directory: Path, tokenizer: Tokenizer, vocabulary: int, *, count_all: bool = False) -> "Reader":
        """That of a checkpoint. Raises a ValueError for one that does not tell which token ends a text."""
        tokenizer.no_padding()
        tokenizer.no_truncation()
        stops = stop_tokens(directory, tokenizer)
        if not stops:
            raise ValueError(f"{directory} has no end-of-sequence token: give its tokenizer_config.json an eos_token")
        end = tokenizer.token_to_id(special_tokens(directory).get("eos_token", ""))
        end = stops[0] if end is None else end
        return cls(tokenizer, load_chat_template(directory), stops, end, vocabulary, count_all)

    def read(self, path: Path, max_length: int) -> Samples:
        """The samples of a file whose rows are of one kind, none longer than `max_length`.

        A text that is longer goes on in the next sample; of other rows the rest is cut off. Raises a UserError that
        tells of every line that is no such row, and for a file without anything to learn.
        """
        rows = read_objects(path)
        kinds = convert(path, rows, _kind)
        line, kind = kinds[0]

        def same(other: str) -> None:
            if other != kind:
                raise ValueError(f"a row of {other}, but those from line {line} on are of {kind}: one kind a file")

        convert(path, kinds, same)
        read: Callable[[dict[str, Any]], list[Sample]] = getattr(self, kind)
        whole = [sample for _, samples in convert(path, rows, read) for sample in samples]
        parts = [part for sample in whole for part in _parts(sample, max_length, go_on=kind == "text")]
        kept = [part for part in parts if part.counted[1:].any()]
        if not kept:
            raise UserError(f"{path}: no row has anything to learn within --max-length {max_length}")
        return Samples(kept, sum(len(sample.tokens) > max_length for sample in whole), len(parts) - len(kept))

    def text(self, row: dict[str, Any]) -> list[Sample]:
        """All of a text counts."""
        return [self._sample(row["text"], [(0, len(row["text"]))], group=row["text"], opened=False)]

    def completion(self, row: dict[str, Any]) -> list[Sample]:
        """Of a prompt and its completion the latter counts, and that it ends."""
        text = row["prompt"] + row["completion"]
        return [self._sample(text, [(len(row["prompt"]), len(text))], group=row["prompt"], opened=False)]

    def messages(self, row: dict[str, Any]) -> list[Sample]:
        """Of a conversation the assistant's turns count.

        A template that tells by `{% generation %}` where they are is believed. Otherwise a turn is what comes to the
        text by it, after what the template opens an answer with. Where that does not stay as it is when others follow
        (reasoning that is shown in the last turn alone), every turn is a sample of its own, with what precedes it.

        Raises a ValueError for a conversation without such a turn, and for what the template does not tell.
        """
        messages = row["messages"]
        turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        if self.template is None:
            raise ValueError("the checkpoint has no chat template, which rows of messages need")
        if not turns:
            raise ValueError('no message has the role "assistant": there is nothing to learn')
        group = json.dumps(messages[: turns[0]])
        text = self.template.render(messages)
        if spans := self.template.answers(messages):
            return [self._sample(text, spans, group)]
        ends = [self.template.render(messages[: n + 1]) for n in turns]
        starts = [self.template.render(messages[:n], add_generation_prompt=True) for n in turns]
        if self.count_all:
            return [self._sample(text, [(len(starts[-1]), len(text))], group)]
        if not all(end.startswith(start) for start, end in zip(starts, ends, strict=True)):
            raise ValueError(
                "the chat template does not begin a turn as add_generation_prompt does, so that it is unknown what "
                "counts: mark it in the template by {% generation %}, or count everything: --loss-on all"
            )
        spans = [(len(start), len(end)) for start, end in zip(starts, ends, strict=True)]
        if all(text.startswith(end) for end in ends):
            return [self._sample(text, spans, group)]
        return [self._sample(end, [span], group) for end, span in zip(ends, spans, strict=True)]

    def _sample(self, text: str, spans: Spans, group: str, *, opened: bool = True) -> Sample:
        """The tokens of a text, of which those in `spans` count; an end is added where the last of them has none.

        A span ends with the last token in it that ends an answer: what follows, the model never writes. `opened` tells
        that the text has the tokens that begin one.
        """
        tokens = self._encode(text)
        counted = np.full(len(tokens), self.count_all)
        for begin, end in spans:
            first, last = self._tokens_before(text[:begin], tokens), self._tokens_before(text[:end], tokens)
            stops = [n for n in range(first, last) if tokens[n] in self.stops]
            counted[first : stops[-1] + 1 if stops else last] = True
        if not stops:
            tokens, counted = [*tokens, self.end], np.append(counted, True)
        if not opened:
            opening = [token for token in self.tokenizer.encode("").ids if token not in self.stops]
            tokens = [*opening, *tokens]
            counted = np.append(np.full(len(opening), self.count_all), counted)
        if (token := max(tokens)) >= self.vocabulary:
            name = self.tokenizer.id_to_token(token)
            raise ValueError(f"{name!r} is token {token}, of which the model has {self.vocabulary}")
        counted[0] = False  # nothing comes before it
        return Sample(np.array(tokens, np.int32), counted, group)

    def _tokens_before(self, start: str, tokens: list[int]) -> int:
        """How many of a text's tokens lie before the end of its `start`: one that lies across it does not."""
        alone = self._encode(start)
        return next((n for n, pair in enumerate(zip(alone, tokens, strict=False)) if pair[0] != pair[1]), len(alone))

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def _kind(row: dict[str, Any]) -> str:
    found = [kind for kind, names in KINDS.items() if row.keys() >= set(names)]
    if len(found) != 1:
        raise ValueError(f"not one of {_FORMS}, but a row of {', '.join(map(repr, row)) or 'nothing'}")
    for name in KINDS[found[0]]:
        check = _check_messages if name == "messages" else _check_text
        check(name, row[name])
    return found[0]


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str) or not (text.strip() or name == "prompt"):
        raise ValueError(f'"{name}" must be a text that is not empty, not {text!r}')


def _check_messages(name: str, messages: Any) -> None:
    good = isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    )
    if not good or not messages:
        raise ValueError(f'"{name}" must be a list of {{"role": text, "content": text}}, not {str(messages)[:80]}')


def _parts(sample: Sample, length: int, *, go_on: bool) -> Iterable[Sample]:
    starts = range(0, len(sample.tokens), length) if go_on else [0]
    for start in starts:
        piece = slice(start, start + length)
        yield sample._replace(tokens=sample.tokens[piece], counted=sample.counted[piece])
