import json
from datetime import datetime
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from jpeft.hf._chat import ChatTemplate, load_chat_template, special_tokens, stop_tokens


FILE = json.loads((Path(__file__).parents[1] / "fixtures/chat/rendered.json").read_text())
ASKED = [{"role": "user", "content": "a"}]


def template(text, **special):
    return ChatTemplate({"default": text}, special)


@pytest.mark.parametrize("name", FILE["cases"])
def test_text_is_that_of_transformers(name):
    case = FILE["cases"][name]
    made = template(case["template"], **FILE["special_tokens"])
    assert made.render(case["messages"], **case["variables"]) == case["rendered"]


def test_answers_are_where_the_template_tells():
    case = FILE["cases"]["generations"]
    made = template(case["template"], **FILE["special_tokens"])
    text, spans = made.render(case["messages"]), made.answers(case["messages"])
    assert [text[a:b] for a, b in spans] == ["2\n</s>\n", "4 é</s>\n"]
    assert template("{{ messages[0].content }}").answers(ASKED) == []


def test_template_may_refuse():
    with pytest.raises(ValueError, match=r"refuses these messages: Conversation roles must alternate"):
        template(FILE["cases"]["llama2"]["template"], bos_token="<s>").render([*ASKED, *ASKED])


@pytest.mark.parametrize(
    "text",
    [
        "{% for m in messages %}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[3].content }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append(1) }}",
        "{{ range(1000000000) | list }}",
        "{% include '/etc/passwd' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_template_that_does_wrong_is_told(text):
    with pytest.raises(ValueError, match="the chat template refuses these messages"):
        template(text).render(ASKED)


def test_template_cannot_change_the_messages():
    messages = [{"role": "user", "content": ["a"]}]
    with pytest.raises(ValueError, match="refuses"):
        template("{{ messages[0].content.append('b') }}").render(messages)
    assert messages == [{"role": "user", "content": ["a"]}]


def test_today_is_known():
    before = datetime.now().year
    assert before <= int(template("{{ strftime_now('%Y') }}").render(ASKED)) <= datetime.now().year


def test_template_of_tools_serves_where_there_are_tools():
    made = ChatTemplate({"default": "plain", "tool_use": "tools"}, {})
    assert made.render(ASKED) == made.render(ASKED, tools=[]) == "plain"
    assert made.render(ASKED, tools=[{"name": "add"}]) == "tools"
    with pytest.raises(ValueError, match='no chat template "default"; it has: tool_use'):
        ChatTemplate({"tool_use": "tools"}, {}).render(ASKED)


@pytest.fixture
def directory(tmp_path):
    """Writes files into a directory."""

    def write(**files):
        for name, content in files.items():
            name, text = (f"{name}.json", json.dumps(content)) if name != "jinja" else ("chat_template.jinja", content)
            (tmp_path / name).write_text(text)
        return tmp_path

    return write


def test_template_is_found_in_every_place(directory):
    assert load_chat_template(directory()) is None
    assert load_chat_template(directory(tokenizer_config={"chat_template": "a"})).sources == {"default": "a"}
    named = [{"name": "default", "template": "b"}, {"name": "rag", "template": "c"}]
    found = load_chat_template(directory(tokenizer_config={"chat_template": named}))
    assert found.sources == {"default": "b", "rag": "c"}
    found = load_chat_template(directory(jinja="é", tokenizer_config={"chat_template": named, "bos_token": "<s>"}))
    assert found == ChatTemplate({"default": "é", "rag": "c"}, {"bos_token": "<s>"})


@pytest.mark.parametrize(
    "wrong", [3, ["a"], [{"name": "default"}], [{"name": "default", "template": 3}], {"default": 1}]
)  # fmt: skip
def test_template_that_is_no_text_is_told(directory, wrong):
    with pytest.raises(ValueError, match="has a chat template that is no text"):
        load_chat_template(directory(tokenizer_config={"chat_template": wrong}))


def test_special_tokens(directory):
    files = {
        "special_tokens_map": {"eos_token": "</s>", "bos_token": "<old>"},
        "tokenizer_config": {
            "bos_token": {"content": "<s>", "lstrip": False}, "add_bos_token": True, "pad_token": None, "model": "x",
        },
    }  # fmt: skip
    assert special_tokens(directory()) == {}
    assert special_tokens(directory(**files)) == {"eos_token": "</s>", "bos_token": "<s>"}


@pytest.mark.parametrize(
    ("files", "tokens"),
    [
        ({}, ()),
        ({"config": {"eos_token_id": 5}}, (5,)),
        ({"config": {"eos_token_id": 5}, "generation_config": {"eos_token_id": [7, 8]}}, (7, 8)),
        ({"config": {"eos_token_id": 5}, "generation_config": {"eos_token_id": None}}, (5,)),
        ({"generation_config": {"eos_token_id": [7, 8]}, "tokenizer_config": {"eos_token": "b"}}, (7, 8, 1)),
        ({"generation_config": {"eos_token_id": 1}, "tokenizer_config": {"eos_token": "b"}}, (1,)),
        ({"tokenizer_config": {"eos_token": "unknown"}}, ()),
    ],
)
def test_stop_tokens(directory, files, tokens):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a"))
    assert stop_tokens(directory(**files), tokenizer) == tokens


@pytest.mark.parametrize("wrong", ["</s>", [1, "2"], 1.5, True])
def test_stop_token_that_is_none_is_told(directory, wrong):
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, "a"))
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id is .*, no token"):
        stop_tokens(directory(generation_config={"eos_token_id": wrong}), tokenizer)
