import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jpeft.generation._text import Text, decoder, until


def byte_level():
    """A tokenizer of single bytes: a character may be four tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def words():
    """A tokenizer of words, that writes a space before every word but the first."""
    tokenizer = Tokenizer(models.WordLevel({"▁a": 0, "▁bc": 1, "d": 2, "<end>": 3}))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


BYTES = byte_level()


def shown(tokenizer, tokens, stop_strings=()):
    """What is shown after every token, and at the end, if there is one."""
    text = Text(decoder(tokenizer), stop_strings)
    pieces = []
    for token in tokens:
        pieces.append(text.add(token))
        if text.stopped:
            return pieces
    return [*pieces, text.end()]


@settings(deadline=None)
@given(st.text(max_size=20))
def test_pieces_are_the_text(text):
    pieces = shown(BYTES, BYTES.encode(text).ids)
    assert "".join(pieces) == text
    assert pieces[-1] == "" or text.endswith("\ufffd")


def test_character_is_shown_when_it_is_whole():
    assert shown(BYTES, BYTES.encode("aé€😀").ids) == ["a", "", "é", "", "", "€", "", "", "", "😀", ""]
    assert shown(BYTES, BYTES.encode("a€").ids[:-1]) == ["a", "", "", "\ufffd"]


def test_spaces_are_those_of_the_whole_text():
    tokens = [0, 3, 1, 2, 3, 0]
    assert shown(words(), tokens) == ["a", "", " bc", "d", "", " a", ""]
    assert "".join(shown(words(), tokens)) == words().decode(tokens)


def test_special_tokens_are_not_shown():
    tokens = [*BYTES.encode("a").ids, BYTES.token_to_id("<end>"), *BYTES.encode("b").ids]
    assert shown(BYTES, tokens) == ["a", "", "b", ""]


def test_beginning_of_a_stop_string_is_held_back():
    assert shown(BYTES, BYTES.encode("a..b").ids, ["..."]) == ["a", "", "", "..b", ""]
    assert shown(BYTES, BYTES.encode("a..").ids, ["..."]) == ["a", "", "", ".."]
    assert shown(BYTES, BYTES.encode("a....b").ids, ["..."]) == ["a", "", "", ""]


@settings(deadline=None)
@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string(text, stop_strings):
    pieces = shown(BYTES, BYTES.encode(text).ids, stop_strings)
    found = [n for n in range(1, len(text) + 1) if any(text[:n].endswith(s) for s in stop_strings)]
    want = until(text[: found[0]] if found else text, stop_strings)
    assert "".join(pieces) == want


@pytest.mark.parametrize(
    ("text", "stop_strings", "want"),
    [("abcabd", ["abd", "c"], "ab"), ("abc", ["x"], "abc"), ("abc", [], "abc"), ("ab", ["ab"], "")],
)
def test_until(text, stop_strings, want):
    assert until(text, stop_strings) == want


def test_tokens_of_any_integer_type():
    assert decoder(BYTES)(np.array(BYTES.encode("ab").ids, np.int32)) == "ab"
