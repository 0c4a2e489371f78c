"""The text of tokens that come one by one, and the strings that end it."""

from collections.abc import Callable, Sequence
from typing import Any


def until(text: str, stop_strings: Sequence[str]) -> str:
    """The text before the first of the strings that is in it."""
    return text[: min((i for s in stop_strings if (i := text.find(s)) >= 0), default=len(text))]


class Text:
    """Decodes one row's tokens as they come, and tells when one of `stop_strings` is complete.

    What may turn out otherwise is held back: half of a character, and what a stop string may begin with.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop_strings: Sequence[str] = ()):
        self.stopped = False
        self._decode = decode
        self._stop_strings = stop_strings
        self._tokens: list[int] = []
        # Tokens are decoded from `_start` on: together with those before `_read`, whose text is known already, as
        # some tokenizers write the first token of a text otherwise than the next.
        self._start = self._read = 0
        self._held = ""

    def add(self, token: int) -> str:
        """What can be shown of the text when this token has come."""
        self._tokens.append(token)
        new = self._new()
        if not new or new.endswith("\ufffd"):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return self._show(new)

    def end(self) -> str:
        """What was held back, when no token comes any more."""
        shown = self._show(self._new()) + self._held
        self._held = ""
        return shown

    def _new(self) -> str:
        before = self._decode(self._tokens[self._start : self._read])
        return self._decode(self._tokens[self._start :])[len(before) :]

    def _show(self, new: str) -> str:
        text = self._held + new
        shown = until(text, self._stop_strings)
        if len(shown) < len(text):
            self.stopped, self._held = True, ""
            return shown
        longest = max(map(len, self._stop_strings), default=1) - 1
        held = next((n for n in range(min(longest, len(text)), 0, -1) if self._may_begin(text[-n:])), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _may_begin(self, text: str) -> bool:
        return any(s.startswith(text) for s in self._stop_strings)


def decoder(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Tokens -> text without special tokens, of a tokenizer of the library `tokenizers` or of transformers."""
    return lambda tokens: tokenizer.decode([int(t) for t in tokens], skip_special_tokens=True)
