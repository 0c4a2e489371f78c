"""What a user can put right."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class UserError(Exception):
    """An input that cannot be worked with. The command prints it as one line and exits with code 2."""


def check_choice(what: str, given: str, known: Iterable[str]) -> None:
    """Raises a UserError, with the nearest names and all names, unless `given` is one of `known`."""
    known = list(known)
    if given in known:
        return
    near = difflib.get_close_matches(given, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UserError(f"unknown {what} {given!r}: {hint}There are: {', '.join(known)}")


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """What goes wrong with a model or a method is the user's to put right, and told in one line."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise UserError(" ".join(str(error).split())) from error
