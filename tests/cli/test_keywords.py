from collections import Counter

import pytest

from jpeft.cli._data import held_out
from jpeft.cli._errors import UserError
from jpeft.cli._keywords import KEYWORDS, keywords


@pytest.fixture(scope="module")
def stdlib():
    return keywords()


@pytest.fixture
def library(tmp_path):
    """Reads a library of one file with the given source."""

    def read(source):
        (tmp_path / "one.py").write_text(source)
        return {(example.text, example.label, example.group) for example in keywords(tmp_path, characters=5)}

    return read


def test_standard_library_is_a_balanced_task(stdlib):
    assert Counter(example.label for example in stdlib) == dict.fromkeys(KEYWORDS, 300)
    assert len({example.text for example in stdlib}) == len(stdlib)


def test_every_text_has_one_place_to_fill(stdlib):
    assert all(example.text.count("[MASK]") >= 1 for example in stdlib)
    assert sum(example.text.count("[MASK]") for example in stdlib) <= len(stdlib) + 5  # a string of the library's own


def test_no_class_or_function_is_on_both_sides(stdlib):
    held = held_out(stdlib, fraction=0.2, salt="evaluation")
    groups = [{x.group for x, h in zip(stdlib, held, strict=True) if h == side} for side in (False, True)]
    assert not groups[0] & groups[1]
    assert 0.15 < held.mean() <= 0.2


@pytest.mark.slow
def test_the_same_library_is_the_same_task(stdlib):
    assert keywords() == stdlib


def test_a_piece_is_the_line_and_its_neighbours_within_the_function(library):
    assert library("x = 1\ndef f(y):\n    if y:\n        y = 2\n        y = 3\n") == {
        ("def f(y):\n[MASK] y:\ny = 2", "if", "one.py:f"),
    }


def test_a_piece_with_several_keywords_is_none(library):
    several = "def f(y):\n    while y:\n        go()\n\ndef f(y):\n    if y:\n        go()\n"
    assert {label for _, label, _ in library(several + "def g(y):\n    return y\n")} == {"return"}


def test_a_piece_that_occurs_again_stays_once(library):
    assert len(library("def f(y):\n    if y:\n        go()\n\ndef f(y):\n    if y:\n        go()\n")) == 1


def test_keywords_in_strings_and_comments_are_none(library):
    with pytest.raises(UserError, match="--data"):
        library('def f(y):\n    y = "if not in"  # while\n')


def test_a_python_without_sources(tmp_path):
    with pytest.raises(UserError, match="--data"):
        keywords(tmp_path)
