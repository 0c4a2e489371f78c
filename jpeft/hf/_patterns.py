"""Regular expressions that a file has: matched by RE2, in time that is linear in the text, whatever they are.

Python's `re` can take for ever: `(a|a)*b` doubles its time with each letter. What RE2 has not, such as `(?!...)`, is no
pattern here.
"""

import functools
from typing import Any

from ._extra import extra


LONGEST = 1000  # characters
MEMORY = 2**20  # bytes that one may be compiled to


def is_pattern(text: str) -> bool:
    """Whether it is an expression that can be matched here."""
    return _compiled(text) is not None


def matches(text: str, name: str) -> bool:
    """Whether the whole of a name matches. **Raises** `ValueError` for what is no pattern."""
    if (pattern := _compiled(text)) is None:
        raise ValueError(f"{text!r} is no regular expression that RE2 matches.")
    return pattern.fullmatch(name) is not None


@functools.lru_cache(maxsize=8192)
def _compiled(text: str) -> Any | None:
    re2 = extra("re2")
    options = re2.Options()
    options.max_mem, options.log_errors = MEMORY, False
    try:
        return re2.compile(text, options) if len(text) <= LONGEST else None
    except (re2.error, UnicodeError):  # the latter for halves of surrogate pairs, which JSON has
        return None
