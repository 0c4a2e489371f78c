"""`jpeft chat`, on a tiny Llama."""

import json
import shutil
import signal

import numpy as np
import pytest

import jpeft
from jpeft import hf
from jpeft.cli import chat, main
from jpeft.cli.chat import Arguments, Conversation
from jpeft.generation import _decoding


COUNT = 12


@pytest.fixture
def say(tiny_llama, capsys, monkeypatch):
    """What the command shows when these lines are typed; an exception is raised in place of a line."""

    def run(lines, *options):
        typed = iter([*lines, EOFError()])

        def read(prompt):
            line = next(typed)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        code = main(["chat", "--model", str(tiny_llama), "--max-new-tokens", str(COUNT), *options])
        assert code == 0
        assert next(typed, None) is None or "/exit" in lines
        return capsys.readouterr().out.removeprefix(chat.HELP + "\n")

    return run


def answers(directory, text):
    """What the model makes of a text that the template has written."""
    model, params, tokenizer = hf.load(directory)
    ids = np.array([tokenizer.encode(text, add_special_tokens=False).ids])
    stop = [tokenizer.token_to_id("<|end|>")]
    return jpeft.generate(model, params, ids, max_new_tokens=COUNT, tokenizer=tokenizer, stop_tokens=stop).text[0]


def test_conversation_is_remembered(say, tiny_llama):
    start = "<s><|system|>Hi.<|end|>\n<|user|>the sky<|end|>\n<|assistant|>"
    first = answers(tiny_llama, start)
    second = answers(tiny_llama, f"{start}{first}<|end|>\n<|user|>grass<|end|>\n<|assistant|>")
    assert say([" the sky ", "", "grass"], "--system", "Hi.") == f"{first}\n{second}\n"


def test_conversation_is_forgotten(say, tiny_llama):
    first = answers(tiny_llama, "<s><|user|>the sky<|end|>\n<|assistant|>")
    second = answers(tiny_llama, "<s><|user|>grass<|end|>\n<|assistant|>")
    assert say(["the sky", "/clear", "grass"]) == f"{first}\n{second}\n"


def test_commands(say):
    assert say(["/help", "/what", "/exit", "the sky"]) == f"{chat.HELP}\n" * 2


@pytest.fixture
def ctrl_c():
    """Ctrl-C interrupts, also where the tests run in the background and it would not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_stops_the_answer_alone(say, tiny_llama, monkeypatch):
    asked = []
    stream = jpeft.stream

    def interrupted(model, params, ids, **options):
        asked.append(ids[0].tolist())
        for n, piece in enumerate(stream(model, params, ids, **options)):
            yield piece
            if len(asked) == 1 and n == 3:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(jpeft, "stream", interrupted)
    shown = say(["the sky", KeyboardInterrupt(), "grass"])
    whole = answers(tiny_llama, "<s><|user|>the sky<|end|>\n<|assistant|>")
    begun, _, rest = shown.partition(" [stopped]\n\n")
    assert whole.startswith(begun) and len(begun) < len(whole)
    assert rest.endswith("\n")
    tokenizer = hf.load(tiny_llama)[2]
    second = tokenizer.decode(asked[1], skip_special_tokens=False)
    assert second == f"<s><|user|>the sky<|end|>\n<|assistant|>{begun}<|end|>\n<|user|>grass<|end|>\n<|assistant|>"


def test_conversation_that_is_too_long_is_told(say, tiny_llama):
    shown = say(["the sky", "the sky", "/clear", "grass"], "--context", "20")
    first = answers(tiny_llama, "<s><|user|>the sky<|end|>\n<|assistant|>")
    assert shown.startswith(first[:5])
    assert "jpeft: the conversation has" in shown
    assert shown.count("\n") == 3


@pytest.fixture
def changed(tiny_llama, tmp_path):
    """The directory of the model with another chat template."""

    def copy(template):
        shutil.copytree(tiny_llama, tmp_path / "changed")
        path = tmp_path / "changed/tokenizer_config.json"
        fields = json.loads(path.read_text()) | {"chat_template": template}
        path.write_text(json.dumps({name: x for name, x in fields.items() if x is not None}))
        return str(tmp_path / "changed")

    return copy


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template: it is for `jpeft generate`"),
        ("{{ raise_exception('No system role') }}", "the chat template refuses these messages: No system role"),
    ],
)
def test_template_that_does_not_serve_is_told_at_once(changed, template, message, capsys):
    assert main(["chat", "--model", changed(template), "--system", "x"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_bad_context(tiny_llama, capsys):
    assert main(["chat", "--model", str(tiny_llama), "--context", "1"]) == 2
    assert "--context must be 2 or more, not 1" in capsys.readouterr().err


def test_turns_share_what_is_compiled(tiny_llama, monkeypatch):
    traces, apply = [], _decoding.apply
    monkeypatch.setattr(_decoding, "apply", lambda *args, **kwargs: (traces.append(1), apply(*args, **kwargs))[1])
    talk = Conversation(Arguments(model=str(tiny_llama), max_new_tokens=5, context=50))
    "".join(talk.answer("a"))
    before = len(traces)
    "".join(talk.answer("b"))
    assert len(traces) == before == 2
    assert len(talk.messages) == 4
