import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from jpeft.cli._data import Example, Texts, held_out, label_names, read_jsonl
from jpeft.cli._errors import UserError


GOOD = '{"text": "a", "label": "x"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "not JSON"),
        ('["a", "x"]', "not a row"),
        ('{"text": "a"}', "not a row"),
        ('{"text": 3, "label": "x"}', '"text" must be'),
        ('{"text": " ", "label": "x"}', '"text" must be'),
        ('{"text": "a", "label": null}', '"label" must be'),
        ('{"text": "a", "label": ["x"]}', '"label" must be'),
    ],
)
def test_malformed_row_is_told_with_its_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(UserError) as error:
        read_jsonl(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert message in str(error.value)


@pytest.mark.parametrize(("content", "message"), [(b"", "is empty"), (b"\n \n", "is empty"), (b"\xff\xfe", "no UTF-8")])
def test_unreadable_file_is_told(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_jsonl(path)


def test_missing_file_is_told(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_jsonl(tmp_path / "rows.jsonl")


def test_rows_are_read_in_order(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD + "\n" + json.dumps({"text": "é\u2028b", "label": 7, "more": 1}, ensure_ascii=False) + "\n")
    assert read_jsonl(path) == [Example("a", "x", "a"), Example("é\u2028b", "7", "é\u2028b")]


examples = st.lists(st.builds(Example, st.text(), st.sampled_from("xyz"), st.sampled_from("abcdefgh")), max_size=60)


@given(examples, st.floats(0.0, 0.9), st.text())
def test_held_out_keeps_groups_and_shares(examples, fraction, salt):
    held = held_out(examples, fraction, salt)
    for label in {example.label for example in examples}:
        mine = [(example.group, h) for example, h in zip(examples, held, strict=True) if example.label == label]
        assert sum(h for _, h in mine) <= fraction * len(mine)
        assert len(set(mine)) == len({group for group, _ in mine})


@given(examples, st.randoms())
def test_held_out_depends_on_no_order(examples, random):
    held = {(e.label, e.group): h for e, h in zip(examples, held_out(examples, 0.5, "salt"), strict=True)}
    random.shuffle(examples)
    assert held == {(e.label, e.group): h for e, h in zip(examples, held_out(examples, 0.5, "salt"), strict=True)}


def test_held_out_is_the_same_everywhere():
    examples = [Example("", "x", group) for group in "abcdefgh"]
    assert "".join(e.group for e, h in zip(examples, held_out(examples, 0.5, "salt"), strict=True) if h) == "bcdf"


@pytest.mark.parametrize(
    ("train", "evaluation", "message"),
    [("xy", "xz", "only in evaluation.*: z"), ("xx", "x", "two labels or more"), ("xy", "", "--eval-data")],
)
def test_labels_that_are_no_task(train, evaluation, message):
    with pytest.raises(UserError, match=message):
        label_names(*([Example("", label, "") for label in side] for side in (train, evaluation)))


LENGTHS = (3, 4, 4, 9, 12, 16, 16, 40, 5, 3, 16, 8, 7)


@pytest.fixture
def texts(tiny_model):
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    made = [Example(" ".join(["the"] * (n - 2)), "xy"[n % 2], "") for n in LENGTHS]
    return Texts(made, ["x", "y"], tokenizer, max_length=16)


def test_texts_are_cut_and_numbered(texts):
    assert [len(tokens) for tokens in texts.tokens] == [min(n, 16) for n in LENGTHS]
    assert texts.labels.tolist() == [n % 2 for n in LENGTHS]


def test_batches_have_few_shapes(texts):
    shapes = {texts.train_batch(step, 2, seed=0).tokens.shape for step in range(50)}
    assert shapes <= {(2, n) for n in (4, 6, 8, 12, 16)}
    assert len(shapes) >= 3


def test_batch_holds_its_texts(texts):
    batch = texts.batch([0, 3], size=3)
    assert batch.mask.sum(axis=1).tolist() == [3, 9, 3]
    assert batch.tokens[1, :9].tolist() == texts.tokens[3]
    assert batch.labels.tolist() == [1, 1, 1]
    assert batch.weights.tolist() == [1.0, 1.0, 0.0]


def test_every_epoch_sees_every_text(texts):
    texts.labels = np.arange(len(texts), dtype=np.int32)  # so that a batch tells its rows
    steps = -(-len(texts) // 4)
    epochs = [[texts.train_batch(e * steps + n, 4, seed=0).labels.tolist() for n in range(steps)] for e in range(3)]
    for epoch in epochs:
        assert {row for batch in epoch for row in batch} == set(range(len(texts)))
    assert epochs[0] != epochs[1] != epochs[2]


def test_batch_is_a_function_of_step_and_seed(texts):
    forward = [texts.train_batch(step, 4, seed=3).tokens.tolist() for step in range(12)]
    backward = [texts.train_batch(step, 4, seed=3).tokens.tolist() for step in reversed(range(12))]
    assert forward == backward[::-1]
    assert forward != [texts.train_batch(step, 4, seed=4).tokens.tolist() for step in range(12)]


def test_evaluation_sees_every_text_once(texts):
    seen = [row for rows, batch in texts.all_batches(4) for row in rows[batch.weights[: len(rows)] == 1]]
    assert sorted(seen) == list(range(len(texts)))
