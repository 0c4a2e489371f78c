"""A text classification task that every Python installation holds: which package does a docstring come from?"""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from jpeft.cli._data import Example
from jpeft.cli._errors import UserError
from jpeft.cli._stdlib import sources


_TOP_LEVEL = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(directory: Path | None = None, *, per_package: int = 100, characters: int = 40) -> list[Example]:
    """The standard library's docstrings, labelled by their top-level package or module.

    Packages with fewer than `per_package` docstrings of at least `characters` characters are left out. The names of all
    packages that stay are masked in every text: masking only its own would tell a text from those of the package that
    it mentions. Of texts that differ in nothing but case, digits and punctuation the first stays; such texts of several
    packages are all left out, for they have no right label. An example's group is the enclosing top-level class or
    function (the file, for a module's docstring): share out groups, not texts, as methods repeat each other's words.

    Args:
      directory: the library's source files, by default those of the running Python.

    Raises a UserError where the library has no source files, or too few of them for two packages.
    """
    found = [example for example in _parse(directory) if len(example.text) >= characters]
    counts = Counter(example.label for example in found)
    packages = sorted(package for package, count in counts.items() if count >= per_package)
    if len(packages) < 2:
        raise UserError(f"{directory or 'this Python'} does not hold the standard library; give your own texts: --data")
    names = re.compile("|".join(re.escape(package.strip("_")) for package in packages), re.IGNORECASE)
    masked = [
        Example(names.sub("[MASK]", example.text), example.label, example.group)
        for example in found
        if example.label in packages
    ]
    return _distinct(masked)


def _parse(directory: Path | None) -> Iterator[Example]:
    for source in sources(directory):
        texts = [(source.file.as_posix(), source.module)]
        texts += [(top.name, node) for top in source.module.body if isinstance(top, _TOP_LEVEL)
                  for node in ast.walk(top) if isinstance(node, _TOP_LEVEL)]  # fmt: skip
        for name, node in texts:
            if text := ast.get_docstring(node):
                yield Example(text, source.package, group=f"{source.package}:{name}")


def _distinct(examples: list[Example]) -> list[Example]:
    words = [" ".join(re.findall("[a-z]+", example.text.lower())) for example in examples]
    packages: dict[str, set[str]] = {}
    for key, example in zip(words, examples, strict=True):
        packages.setdefault(key, set()).add(example.label)
    first = dict(zip(reversed(words), reversed(examples), strict=True))
    return [example for key, example in reversed(first.items()) if len(packages[key]) == 1]
