"""The standard library's source files, which every Python installation holds."""

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib-dynload"}


class Source(NamedTuple):
    """A file of the library: its path there, its text, and its syntax tree."""

    file: Path
    text: str
    module: ast.Module

    @property
    def package(self) -> str:
        """The top-level package or module."""
        return self.file.parts[0].removesuffix(".py")


def sources(directory: Path | None = None) -> Iterator[Source]:
    """Every file of the library in the order of its path, without tests and files for other Pythons.

    `directory` is the library's, by default that of the running Python.
    """
    directory = Path(sysconfig.get_path("stdlib")) if directory is None else directory
    for path in sorted(directory.rglob("*.py")):
        file = path.relative_to(directory)
        if _SKIPPED & set(file.parts):
            continue
        with warnings.catch_warnings(action="ignore"):  # of invalid escapes in old files
            try:
                text = path.read_text(encoding="utf-8")
                yield Source(file, text, ast.parse(text))
            except (SyntaxError, ValueError):
                continue
