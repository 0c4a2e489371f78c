"""Which tokens of a row are learned: compared with the texts that they spell."""

import json

import numpy as np
import pytest
from causal import SPECIAL, TEMPLATE, byte_level_tokenizer, save_tokenizer, write_rows
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jpeft.cli._errors import UserError
from jpeft.cli._samples import Reader


TOKENIZER = byte_level_tokenizer()
MARKED = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}{% else %}{{ message['content'] }}"
    "{% endif %}{% endfor %}"
)
# Reasoning is shown in the last turn alone, as Qwen3's template has it.
REASONING = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}{% if message['role'] == 'assistant' "
    "and loop.last %}{{ 'hm ' }}{% endif %}{{ message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ENDLESS = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
ENDLESS += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
OTHERWISE = ENDLESS.replace("'assistant:'", "'assistant, think:'")
TALK = [
    {"role": "user", "content": "what is the sky?"},
    {"role": "assistant", "content": "blue"},
    {"role": "user", "content": "the sun?"},
    {"role": "assistant", "content": "red"},
]


@pytest.fixture
def reader(tmp_path):
    def make(*, template=TEMPLATE, end="<|end|>", tokenizer=TOKENIZER, **options):
        save_tokenizer(tmp_path, tokenizer, template=template, end=end)
        return Reader.of(tmp_path, tokenizer, 300, **options)

    return make


def spelled(sample, which, tokenizer=TOKENIZER):
    """The text of the tokens that count, or do not."""
    return tokenizer.decode(sample.tokens[sample.counted == which], skip_special_tokens=False)


def runs(sample):
    """The text of every run of tokens that count."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.counted, [0]])))
    pieces = zip(edges[::2], edges[1::2], strict=True)
    return [TOKENIZER.decode(sample.tokens[a:b], skip_special_tokens=False) for a, b in pieces]


def test_a_completion_and_its_end_count(reader):
    (sample,) = reader().completion({"prompt": "what is the sky?", "completion": " blue"})
    assert spelled(sample, False) == "<s>what is the sky?"
    assert spelled(sample, True) == " blue<|end|>"
    assert sample.tokens[: np.sum(~sample.counted)].tolist() == TOKENIZER.encode("what is the sky?").ids


def test_a_token_across_the_border_counts(reader):
    assert TOKENIZER.encode("the colour").tokens == ["<s>", "the", "Ġcolour"]
    (sample,) = reader().completion({"prompt": "the col", "completion": "our"})
    assert (spelled(sample, False), spelled(sample, True)) == ("<s>the", " colour<|end|>")


words = st.text(st.sampled_from("what is the colour? sky\n é"), max_size=12)


@given(words, words.filter(str.strip))
def test_what_counts_spells_the_completion(prompt, completion):
    reader = Reader(TOKENIZER, None, (4,), 4, 300)
    (sample,) = reader.completion({"prompt": prompt, "completion": completion})
    rest, learned = spelled(sample, False).removeprefix("<s>"), spelled(sample, True)
    assert rest + learned == f"{prompt}{completion}<|end|>"
    assert prompt.startswith(rest)
    assert len(TOKENIZER.encode(prompt).ids) >= np.sum(~sample.counted)


def test_all_of_a_text_counts_but_its_first_token(reader):
    (sample,) = reader().text({"text": "the sky"})
    assert (spelled(sample, False), spelled(sample, True)) == ("<s>", "the sky<|end|>")


def test_everything_counts_on_request(reader):
    everything = reader(count_all=True)
    (pair,) = everything.completion({"prompt": "the sky", "completion": " blue"})
    (talk,) = everything.messages({"messages": TALK})
    assert all(sample.counted[1:].all() and not sample.counted[0] for sample in (pair, talk))


@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
def test_the_turns_of_the_assistant_count(reader, template):
    chat = reader(template=template)
    (sample,) = chat.messages({"messages": TALK})
    assert runs(sample) == ["blue<|end|>", "red<|end|>"]
    whole = TOKENIZER.decode(sample.tokens, skip_special_tokens=False)
    assert whole == chat.template.render(TALK)


def test_turns_that_change_when_others_follow_are_samples_of_their_own(reader):
    first, second = reader(template=REASONING).messages({"messages": TALK})
    assert (runs(first), runs(second)) == (["hm blue<|end|>"], ["hm red<|end|>"])
    before = "<|user|>what is the sky?<|end|><|assistant|>blue<|end|><|user|>the sun?<|end|><|assistant|>"
    assert spelled(second, False) == before


def test_an_end_is_written_where_the_template_writes_none(reader):
    (sample,) = reader(template=ENDLESS).messages({"messages": TALK[:2]})
    assert runs(sample) == [" blue\n<|end|>"]


def test_any_token_that_ends_an_answer_is_an_end(reader, tmp_path):
    """As with Gemma, whose turns end with another token than its texts."""
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [SPECIAL.index("<|end|>")]}))
    both = reader(end="</s>")
    assert runs(both.messages({"messages": TALK[:2]})[0]) == ["blue<|end|>"]
    assert runs(both.text({"text": "the sky"})[0]) == ["the sky</s>"]


def test_a_tokenizer_that_writes_a_space_before_a_text():
    words = ("<unk>", "</s>", "▁the", "▁sky", "▁blue")
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    (sample,) = Reader(tokenizer, None, (1,), 1, 5).completion({"prompt": "the sky", "completion": " blue"})
    assert sample.tokens.tolist() == [2, 3, 4, 1]
    assert sample.counted.tolist() == [False, False, True, True]


def test_a_long_text_goes_on_and_others_are_cut(reader, tmp_path):
    long = {"text": "the sky " * 10}
    read = reader().read(write_rows(tmp_path / "texts.jsonl", [long]), 8)
    (whole,) = reader().text(long)
    assert np.concatenate([sample.tokens for sample in read.kept]).tolist() == whole.tokens.tolist()
    assert (read.cut, read.dropped) == (1, 0)
    pairs = [{"prompt": "the sky " * n, "completion": "is blue"} for n in (1, 3, 10)]
    read = reader().read(write_rows(tmp_path / "pairs.jsonl", pairs), 8)
    assert [len(sample.tokens) for sample in read.kept] == [7, 8]
    assert (read.cut, read.dropped) == (2, 1)


GOOD = {"prompt": "a", "completion": "b"}
BAD = [
    ({"prompt": "a"}, "a row of 'prompt'"),
    ({}, "a row of nothing"),
    (GOOD | {"text": "c"}, "a row of 'prompt', 'completion', 'text'"),
    ({"prompt": 3, "completion": "b"}, '"prompt" must be a text'),
    ({"prompt": "a", "completion": " "}, '"completion" must be a text that is not empty'),
    ({"text": ""}, '"text" must be a text that is not empty'),
    ({"messages": []}, '"messages" must be a list'),
    ({"messages": [{"role": "user"}]}, '"messages" must be a list'),
    ({"text": "c"}, "a row of text, but those from line 1 on are of completion"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_every_bad_line_is_told(reader, tmp_path, row, message):
    path = write_rows(tmp_path / "rows.jsonl", [GOOD, row, GOOD, row])
    with pytest.raises(UserError) as error:
        reader().read(path, 16)
    second, fourth = str(error.value).split("; ")
    assert second.startswith(f"{path}:2: ") and fourth.startswith(f"{path}:4: ")
    assert message in second and message in fourth


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, TALK, "no chat template"),
        (TEMPLATE, TALK[:1], 'no message has the role "assistant"'),
        (OTHERWISE, TALK, "{% generation %}"),
        ("{{ raise_exception('roles must alternate') }}", TALK, "roles must alternate"),
    ],
)
def test_what_the_template_does_not_take_is_told(reader, tmp_path, template, messages, message):
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": messages}])
    with pytest.raises(UserError) as error:
        reader(template=template).read(path, 16)
    assert str(error.value).startswith(f"{path}:1: ")
    assert message in str(error.value)


def test_a_row_of_its_prompt_alone_teaches_nothing(reader, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "the sky " * 10, "completion": "b"}])
    with pytest.raises(UserError, match="anything to learn within --max-length 8"):
        reader().read(path, 8)


def test_a_checkpoint_without_an_end_is_told(reader):
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        reader(end=None)


def test_a_token_that_the_model_does_not_have_is_told(reader, tmp_path):
    more = byte_level_tokenizer()
    more.add_special_tokens(["<image>"])
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "the sky"}, {"text": "the <image>"}])
    with pytest.raises(UserError, match=r"jsonl:2: '<image>' is token 300, of which the model has 300"):
        reader(tokenizer=more).read(path, 16)
