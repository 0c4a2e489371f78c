"""What the processes of a program tell each other, so that all go on, or none."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from .distributed._together import barrier


Json = Any
T = TypeVar("T")


def gathered(value: Json) -> list[Json]:
    """The JSON value of every process, in their order."""
    if jax.process_count() == 1:
        return [value]
    barrier("gathered")  # a process may come late to it, but not to a collective
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(text.size))
    rows = multihost_utils.process_allgather(np.pad(text, (0, int(max(sizes)) - text.size)))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def everywhere(fn: Callable[[], T], error: type[Exception]) -> T:
    """`fn()`, once it has succeeded in every process.

    **Raises** what it raised in this process, and `error` where it raised in others alone.
    """
    found, raised = None, None
    try:
        found = fn()
    except Exception as e:
        raised = e
    faults = gathered(None if raised is None else f"{type(raised).__name__}: {raised}")
    if raised is not None:
        raise raised
    if elsewhere := [f"in process {n}, {fault}" for n, fault in enumerate(faults) if fault is not None]:
        raise error("; ".join(elsewhere))
    return found


def first(fn: Callable[[], Json], error: type[Exception]) -> Json:
    """What `fn()` returns in the first process, which alone calls it. It raises as `everywhere` does."""
    return gathered(everywhere(lambda: fn() if jax.process_index() == 0 else None, error))[0]
