import itertools

import pytest

from jpeft.cli._data import held_out
from jpeft.cli._docstrings import docstrings
from jpeft.cli._errors import UserError


@pytest.fixture(scope="module")
def stdlib():
    return docstrings()


@pytest.fixture
def library(tmp_path):
    """Makes a library of packages `alpha` and `beta` with the given sources, by file, and reads it."""

    def read(sources):
        function = 'def {0}():\n    """{1}: {0}{0}"""\n'
        fill = {f"{package}/__init__.py": "".join(function.format(name, package) for name in names)
                for package, names in {"alpha": "abcd", "beta": "efgh"}.items()}  # fmt: skip
        for file, source in (fill | sources).items():
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(source)
        return docstrings(tmp_path, per_package=4, characters=5)

    return read


def test_standard_library_is_a_task(stdlib):
    labels = [example.label for example in stdlib]
    assert len(set(labels)) >= 10
    assert len(stdlib) >= 2000
    assert min(map(labels.count, set(labels))) >= 50  # of 100 before duplicates are removed


def test_no_package_is_named(stdlib):
    names = {example.label.strip("_").lower() for example in stdlib}
    assert not [(name, text.text) for name, text in itertools.product(names, stdlib) if name in text.text.lower()]


def test_no_text_occurs_twice(stdlib):
    assert len({example.text for example in stdlib}) == len(stdlib)


def test_no_class_stands_on_both_sides(stdlib):
    held = held_out(stdlib, fraction=0.2, salt="evaluation")
    sides = [{example.group for example, h in zip(stdlib, held, strict=True) if h == side} for side in (True, False)]
    assert sides[0].isdisjoint(sides[1])
    assert 0.15 < held.mean() <= 0.2


def test_packages_keep_their_share(stdlib):
    held = held_out(stdlib, fraction=0.2, salt="evaluation")
    for label in {example.label for example in stdlib}:
        share = [h for example, h in zip(stdlib, held, strict=True) if example.label == label]
        assert 0.1 < sum(share) / len(share) <= 0.2


def test_all_names_are_masked_and_tests_skipped(library):
    found = library({"alpha/more.py": '"""Alphabets, as beta has them."""', "beta/tests/x.py": '"""Not to be seen."""'})
    texts = [example.text for example in found]
    assert "[MASK]bets, as [MASK] has them." in texts
    assert "Not to be seen." not in texts


def test_small_packages_are_left_out(library):
    assert {example.label for example in library({"gamma.py": '"""Of one docstring."""'})} == {"alpha", "beta"}


def test_short_texts_are_left_out(library):
    assert "abcd" not in [example.text for example in library({"alpha/more.py": '"""abcd"""'})]


def test_methods_are_grouped_with_their_class(library):
    source = 'class C:\n    """The class."""\n    def f(self):\n        """The method."""\n'
    found = {example.text: example.group for example in library({"alpha/more.py": source, "beta/c.py": "class C: ..."})}
    assert found["The class."] == found["The method."] == "alpha:C"


def test_first_of_like_texts_stays(library):
    source = 'def f():\n    """Add 1 to it."""\ndef g():\n    """add 2 to it!"""\n'
    found = library({"alpha/more.py": source})
    assert [example.group for example in found if "to it" in example.text] == ["alpha:f"]


def test_texts_of_several_packages_go(library):
    source = '"""Said by both."""'
    assert "Said by both." not in [example.text for example in library({"alpha/x.py": source, "beta/x.py": source})]


def test_broken_sources_are_passed_over(library):
    found = library({"alpha/broken.py": "def (:", "alpha/escape.py": '"""No escape: \\d."""'})
    assert "No escape: \\d." in [example.text for example in found]


def test_order_is_that_of_the_files(library):
    found = library({"alpha/z.py": '"""The last of it."""', "alpha/a.py": '"""The middle of it."""'})
    assert [example.text for example in found if "of it" in example.text] == ["The middle of it.", "The last of it."]


def test_no_sources_are_told(tmp_path):
    with pytest.raises(UserError, match="give your own texts: --data"):
        docstrings(tmp_path)
