"""The directories of a training run's steps: which are whole, what they hold, what is left of others.

    7/manifest/metadata      what the arrays are, sealed
    7/state                  the arrays, written by Orbax
    8.orbax-checkpoint-tmp   a step that is being written, or was when the process ended
    .trash                   steps that are being deleted
    6.damaged                a step that could not be restored
"""

import contextlib
import dataclasses
import itertools
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from ._processes import everywhere
from ._storage import CheckpointError, Json, check_arrays, flush, stored_arrays, unsealed
from ._training_state import TrainingState


STATE, MANIFEST = "state", "manifest"
UNFINISHED, TRASH = "*.orbax-checkpoint-tmp*", ".trash"


def committed(directory: Path) -> tuple[int, ...]:
    """The steps that are there as a whole, ascending."""
    return tuple(sorted(ocp.utils.checkpoint_steps(directory))) if directory.exists() else ()


def manifest(directory: Path, step: int) -> dict[str, Json]:
    """**Raises** `CheckpointError` where it is damaged, or that of another step."""
    file = directory / str(step) / MANIFEST / "metadata"
    found = unsealed(file)
    if found.get("step") != step:
        raise CheckpointError(f"{file} is that of step {found.get('step')}.")
    return found


def metrics(directory: Path, step: int) -> dict[str, float]:
    """None of a step that is damaged."""
    with contextlib.suppress(CheckpointError):
        return manifest(directory, step)["metrics"]
    return {}


def read(directory: Path, step: int, state: TrainingState) -> tuple[dict[str, Json], dict[str, Any]]:
    """The manifest and the arrays of a step, for a state like that.

    Every process reads its parts. **Raises** `CheckpointError` in all where one finds damage; `TreeMismatchError`.
    """
    found = everywhere(lambda: manifest(directory, step), CheckpointError)
    state.check(found, f"Step {step} of {directory}")
    where = directory / str(step) / STATE
    arrays = everywhere(lambda: stored_arrays(where, state.targets(found)), CheckpointError)
    everywhere(lambda: check_arrays(found["arrays"], arrays, where), CheckpointError)
    return found, arrays


def set_aside(directory: Path, damaged: Iterable[int]) -> None:
    """Rename steps that cannot be restored, so that there can be some of these numbers again."""
    for step in damaged:
        names = (directory / f"{step}.damaged{n or ''}" for n in itertools.count())
        os.rename(directory / str(step), next(name for name in names if not name.exists()))


def flush_unfinished(directory: Path) -> None:
    """For Orbax to call before it renames a step: by itself it flushes the arrays alone."""
    for step in directory.glob(UNFINISHED):
        for file in (*step.rglob("*"), step):
            flush(file)


def settle(directory: Path) -> None:
    """Wait for what Orbax may still be writing of a save that failed: the next one may write to the same place."""
    before = None
    for _ in range(100):
        now = sorted(str(file) for step in directory.glob(UNFINISHED) for file in step.rglob("*"))
        if now == before:
            break
        before = now
        time.sleep(0.1)


def sweep(directory: Path) -> None:
    """Remove what is half written or half deleted."""
    for left in (*directory.glob(UNFINISHED), directory / TRASH):
        shutil.rmtree(left, ignore_errors=True)


@dataclasses.dataclass
class Best:
    """Tells Orbax to keep the best step. By a policy of its own, one whose metric is NaN can be the best.

    `values` are finite, or `None`; `sign` is -1 where higher is better.
    """

    sign: int
    values: dict[int, float | None] = dataclasses.field(default_factory=dict)

    def of(self, steps: Iterable[int]) -> int | None:
        known = [step for step in steps if self.values.get(step) is not None]
        return min(known, key=lambda step: self.sign * self.values[step], default=None)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = self.of(steps)
        return [step == best for step in steps]
