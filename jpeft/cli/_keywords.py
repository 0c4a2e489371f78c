"""A text classification task that every Python installation holds: which keyword is missing from this code?"""

import ast
import hashlib
import io
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from jpeft.cli._data import Example
from jpeft.cli._errors import UserError
from jpeft.cli._stdlib import Source, sources


KEYWORDS = ("and", "elif", "except", "for", "if", "in", "is", "not", "or", "raise", "return", "while")


def keywords(directory: Path | None = None, *, per_keyword: int = 300, characters: int = 40) -> list[Example]:
    """Pieces of the standard library's code with one keyword masked, labelled by that keyword.

    A piece is the keyword's line with the line before it and the one after it, in the same top-level class or function,
    which is the example's group. There are at most `per_keyword` of each keyword, picked by a hash of their place, so
    that the same library gives the same task. A piece that occurs again stays once, and one with several keywords is
    left out.

    **Arguments:**

    - `directory`: the library's source files, by default those of the running Python.
    - `characters`: the shortest piece.

    **Raises** `UserError` where the library has no source files.
    """
    found: dict[str, dict[str, tuple[bytes, Example]]] = defaultdict(dict)
    for source in sources(directory):
        for place, piece, example in _pieces(source):
            if len(example.text) >= characters:
                found[piece].setdefault(example.label, (place, example))
    once = [next(iter(examples.values())) for examples in found.values() if len(examples) == 1]
    if not once:
        raise UserError(f"{directory or 'this Python'} does not hold the standard library; give your own texts: --data")
    by_keyword = {word: sorted(x for x in once if x[1].label == word)[:per_keyword] for word in KEYWORDS}
    return [example for examples in by_keyword.values() for _, example in examples]


def _pieces(source: Source) -> Iterator[tuple[bytes, str, Example]]:
    """The hash of a piece's place, the piece with its keyword taken out, and the example that it makes."""
    owner = {n: top for top in source.module.body for n in range(top.lineno, top.end_lineno + 1)}
    lines = source.text.splitlines()
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source.text).readline))
    except (tokenize.TokenError, SyntaxError):
        return
    for token in tokens:
        row, column = token.start
        if token.type != tokenize.NAME or token.string not in KEYWORDS or row not in owner:
            continue
        top, line = owner[row], lines[row - 1]
        masked = f"{line[:column]}[MASK]{line[column + len(token.string) :]}"
        piece = [*lines[max(top.lineno, row - 1) - 1 : row - 1], masked, *lines[row : min(top.end_lineno, row + 1)]]
        text = "\n".join(map(str.strip, piece))
        place = hashlib.sha256(f"{source.file.as_posix()}:{row}:{column}".encode()).digest()
        yield place, text, Example(text, token.string, group=f"{source.file.as_posix()}:{_name(top)}")


def _name(top: ast.stmt) -> str:
    return getattr(top, "name", str(top.lineno))
