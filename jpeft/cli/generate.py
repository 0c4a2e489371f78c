"""`jpeft generate`: a model goes on with a text."""

import dataclasses
import sys
from pathlib import Path

from jpeft.cli import _speaker
from jpeft.cli._errors import UserError
from jpeft.cli._speaker import Speaker


@dataclasses.dataclass(frozen=True)
class Arguments(_speaker.Arguments):
    """Let a model go on with a text, or answer it. What it writes is shown as it comes, and nothing else."""

    prompt: str | None = None
    """The text."""

    file: Path | None = None
    """A file that has the text; - for the standard input."""

    def text(self) -> str:
        """Raises a UserError unless there is just one."""
        if (self.prompt is None) == (self.file is None):
            raise UserError("give the text by --prompt TEXT or by --file FILE")
        if self.prompt is not None:
            return self.prompt
        try:
            return sys.stdin.read() if self.file == Path("-") else self.file.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot read {self.file}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"cannot read {self.file}: it is no UTF-8 text") from error


def generate(arguments: Arguments) -> None:
    """Write to the standard output what follows the text.

    Raises a UserError for what the user can put right.
    """
    text = arguments.text()
    speaker = Speaker(arguments)
    tokens = speaker.tokenizer.encode(text).ids
    if not tokens:
        raise UserError("the text is empty: there is nothing to go on with")
    for piece in speaker.answer(tokens):
        print(piece, end="", flush=True)
    print()
