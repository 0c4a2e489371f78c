"""Tasks of examples: the call of a model says them, and nodes inside of it ask."""

import jax

from .._node import Additive
from ._room import entered, opened, opening


class Tasks(Additive):
    """Takes `task_ids` (batch,) from the call of a model that it stands beside, for the nodes inside."""

    def around(self, call, key, *args, **kwargs):
        with opening(entered(True, kwargs)):
            return call(*args, **kwargs)

    def at_rest(self, task=None):
        return None  # what needed it has one task


def check_task(task: int | None, known: int) -> None:
    """**Raises** `ValueError` for a task that is none of those that are `known`."""
    if task is not None and not 0 <= task < known:
        raise ValueError(f"There is no task {task}: there are {known}, numbered from 0.")


def task_ids() -> jax.Array | None:
    """The tasks `(batch,)` that the call of the model gave, if it did."""
    room = opened()
    return None if room is None else room.tasks
