"""Variables of a call, which what is called can read."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import TypeVar


T = TypeVar("T")


@contextlib.contextmanager
def setting(variable: contextvars.ContextVar[T], value: T) -> Iterator[None]:
    """Within it, `variable` has this value."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
