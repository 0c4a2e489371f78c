"""`jpeft chat`: a conversation with a model."""

import contextlib
import dataclasses
from collections.abc import Iterator

from jpeft.cli import _speaker
from jpeft.cli._errors import UserError, one_line
from jpeft.cli._speaker import Speaker
from jpeft.hf._chat import load_chat_template


HELP = "/clear forgets the conversation, /exit ends it, and so does Ctrl-D. Ctrl-C stops an answer."
BUCKET = 64  # tokens; a conversation compiles something anew only when it has grown by so many

Message = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Arguments(_speaker.Arguments):
    """Talk with a model, by its chat template. /help tells what can be typed."""

    system: str | None = None
    """What the model is told before the conversation."""

    context: int = 4096
    """How many tokens a conversation may have, if the model has positions for them."""

    def check(self) -> None:
        super().check()
        if self.context < 2:
            raise UserError(f"--context must be 2 or more, not {self.context}")


def chat(arguments: Arguments) -> None:
    """Read lines and answer them, until the end of the input.

    Raises a UserError for what the user can put right before the conversation; in it, it is told and goes on.
    """
    talk = Conversation(arguments)
    print(HELP)
    with contextlib.suppress(EOFError):
        while (line := _read()) != "/exit":
            if line == "/clear":
                talk.clear()
            elif line.startswith("/"):
                print(HELP)
            elif line:
                _print_answer(talk, line)


def _read() -> str:
    """A line without the spaces around it; `""` after a Ctrl-C. Raises an EOFError at the end of the input."""
    try:
        return input("> ").strip()
    except KeyboardInterrupt:
        print()
        return ""


def _print_answer(talk: "Conversation", line: str) -> None:
    try:
        for text in talk.answer(line):
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    except UserError as error:
        print(f"jpeft: {error}", end="")
    print()


class Conversation:
    """What was said, and who answers."""

    def __init__(self, arguments: Arguments):
        """Raises a UserError for a model that cannot be loaded, or has no chat template for these messages."""
        self._system = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
        self._speaker = Speaker(arguments)
        limit = getattr(self._speaker.model.config, "max_position_embeddings", arguments.context)
        self._context, self._longest = min(limit, arguments.context), arguments.max_new_tokens
        with one_line():
            self._template = load_chat_template(self._speaker.directory)
            if self._template is None:
                raise UserError(f"{self._speaker.directory} has no chat template: it is for `jpeft generate`")
            self._template.render([*self._system, {"role": "user", "content": "?"}], add_generation_prompt=True)
        self.clear()

    def clear(self) -> None:
        """Forget all but the system's message."""
        self.messages: list[Message] = list(self._system)

    def answer(self, line: str) -> Iterator[str]:
        """The answer, piece by piece; what was given of it is remembered even if the rest is not asked for.

        Raises a UserError, and remembers nothing, for a conversation that is too long or that the template refuses.
        """
        asked = [*self.messages, {"role": "user", "content": line}]
        with one_line():
            text = self._template.render(asked, add_generation_prompt=True)
        tokens = self._speaker.tokenizer.encode(text, add_special_tokens=False).ids
        room = min(self._longest, self._context - len(tokens))
        if room < 1:
            raise UserError(f"the conversation has {len(tokens)} tokens of {self._context}: /clear forgets it")
        pieces = self._speaker.answer(
            tokens, turn=len(asked), max_new_tokens=room, pad_to_multiple_of=BUCKET, cache_length=self._context + BUCKET
        )
        said = {"role": "assistant", "content": ""}
        for piece in pieces:
            said["content"] += piece
            self.messages = [*asked, said]
            yield piece
