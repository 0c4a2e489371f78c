"""How a checkpoint is talked to: its chat template, its special tokens, and the tokens that end an answer."""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ._errors import FormatError
from ._extra import extra
from ._repository import read_bytes, read_json


if TYPE_CHECKING:
    from jinja2 import Template
    from tokenizers import Tokenizer

# Around what `{% generation %}` encloses. Unicode keeps these two for a program's own use: no text has them.
_START, _END = "\ufdd0", "\ufdd1"


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """What turns messages into the text that the model was trained to answer.

    **Fields:**

    - `sources`: Jinja templates by name: `"default"`, and others such as `"tool_use"`.
    - `special_tokens`: what they are told of the tokenizer: `{"bos_token": "<s>", ...}`.
    """

    sources: Mapping[str, str]
    special_tokens: Mapping[str, str]

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The text of `messages`, `{"role": ..., "content": ...}` each.

        It has its special tokens already: encode it with `add_special_tokens=False`. `variables` are the template's,
        such as `add_generation_prompt=True`, which opens an answer, `tools` and `documents`.

        **Raises** `ValueError` for what the template refuses, and for a template that is no good.
        """
        return self._marked(messages, variables).replace(_START, "").replace(_END, "")

    def answers(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[tuple[int, int]]:
        """Where the model's own words are in what `render` returns: start and end of each `{% generation %}`.

        Empty for a template that does not tell. **Raises** as `render` does.
        """
        spans, length, opened = [], 0, 0
        for piece in re.split(f"([{_START}{_END}])", self._marked(messages, variables)):
            if piece == _START:
                opened = length
            elif piece == _END:
                spans.append((opened, length))
            else:
                length += len(piece)
        return spans

    def _marked(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        source = self._source(bool(variables.get("tools")))
        given = {"tools": None, "documents": None, "add_generation_prompt": False, **self.special_tokens, **variables}
        # Through JSON: a template is foreign code, and is to see plain data.
        plain = json.loads(json.dumps({"messages": [_present(m) for m in messages], **given}))
        try:
            return _compiled(source).render(plain)
        except Exception as error:  # whatever it is, the template raised it
            raise ValueError(f"the chat template refuses these messages: {error}") from error

    def _source(self, tools: bool) -> str:
        for name in ("tool_use", "default") if tools else ("default",):
            if name in self.sources:
                return self.sources[name]
        raise ValueError(f'the checkpoint has no chat template "default"; it has: {", ".join(self.sources)}')


def load_chat_template(directory: str | Path) -> ChatTemplate | None:
    """The chat template of a checkpoint's directory, `None` where it has none.

    It is in `chat_template.jinja`, or in `tokenizer_config.json` as a text or as a list of named ones.

    **Raises** `FormatError` for files that cannot be read so.
    """
    directory = Path(directory)
    found = (read_json(directory, "tokenizer_config.json") or {}).get("chat_template") or {}
    try:
        if isinstance(found, list):
            found = {entry["name"]: entry["template"] for entry in found}
        sources = {"default": found} if isinstance(found, str) else dict(found)
        if (text := read_bytes(directory, "chat_template.jinja")) is not None:
            sources["default"] = text.decode("utf-8")
        if not all(isinstance(text, str) for pair in sources.items() for text in pair):
            raise TypeError
    except (KeyError, TypeError, UnicodeDecodeError) as error:
        raise FormatError(f"{directory} has a chat template that is no text") from error
    return ChatTemplate(sources, special_tokens(directory)) if sources else None


def special_tokens(directory: str | Path) -> dict[str, str]:
    """The texts of a checkpoint's special tokens, by what they are for: `{"bos_token": "<s>", ...}`."""
    files = ("special_tokens_map.json", "tokenizer_config.json")
    tokens = {name: x for path in files for name, x in (read_json(Path(directory), path) or {}).items()}
    # Either a text, or an object with its text as "content".
    texts = {name: x.get("content") if isinstance(x, dict) else x for name, x in tokens.items()}
    return {name: text for name, text in texts.items() if name.endswith("_token") and isinstance(text, str)}


def stop_tokens(directory: str | Path, tokenizer: "Tokenizer") -> tuple[int, ...]:
    """The tokens that end an answer: those of `generation_config.json`, or else `config.json`, and `eos_token`.

    **Raises** `FormatError` for an `eos_token_id` that is no token or list of tokens.
    """
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        given = (read_json(Path(directory), name) or {}).get("eos_token_id")
        if given is not None:
            found = given if isinstance(given, list) else [given]
            if not all(type(x) is int for x in found):
                raise FormatError(f"{Path(directory) / name}: eos_token_id is {given!r}, no token")
            break
    end = tokenizer.token_to_id(special_tokens(directory).get("eos_token", ""))
    return tuple(dict.fromkeys([*found, *([] if end is None else [end])]))


def _present(message: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is `None`: templates ask whether a key is there."""
    return {name: x for name, x in message.items() if x is not None}


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> "Template":
    """The template, in a sandbox with what transformers gives to templates.

    Source: https://github.com/huggingface/transformers, `utils/chat_template_utils.py`.
    """
    jinja2, ext, sandbox = (extra(name) for name in ("jinja2", "jinja2.ext", "jinja2.sandbox"))

    class Generation(ext.Extension):
        """`{% generation %}...{% endgeneration %}` encloses what the model itself says."""

        tags: ClassVar = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller):
            return f"{_START}{caller()}{_END}"

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    extensions = [Generation, ext.loopcontrols]
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = tojson  # Jinja's own escapes HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment.from_string(source)
