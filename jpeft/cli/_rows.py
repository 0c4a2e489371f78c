"""JSON Lines files, of which every bad line is told."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from jpeft.cli._errors import UserError


X = TypeVar("X")
Y = TypeVar("Y")
Numbered = list[tuple[int, X]]  # with the numbers of the lines

_SHOWN = 8


def read_objects(path: Path) -> Numbered[dict[str, Any]]:
    """The objects of a file, one a line; empty lines are passed over.

    Raises a UserError for a file that cannot be read or is empty, and for all lines that are no objects.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise UserError(f"cannot read {path}: {reason}") from error
    rows = convert(path, [(n, line) for n, line in enumerate(lines, start=1) if line.strip()], _object)
    if not rows:
        raise UserError(f"{path} is empty")
    return rows


def convert(path: Path, rows: Iterable[tuple[int, X]], fn: Callable[[X], Y]) -> Numbered[Y]:
    """`fn(row)` for every row.

    Raises a UserError that tells of every line for which `fn` raises a ValueError, and why.
    """
    found, faults = [], []
    for number, row in rows:
        try:
            found.append((number, fn(row)))
        except ValueError as error:
            faults.append(f"{path}:{number}: {' '.join(str(error).split())}")
    if faults:
        more = f"; and {len(faults) - _SHOWN} more lines" if len(faults) > _SHOWN else ""
        raise UserError("; ".join(faults[:_SHOWN]) + more)
    return found


def _object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"not a row {{...}}: {line[:80]}")
    return row
