"""Checkpoints of a training run: every step that is listed restores exactly, or is refused by name."""

import contextlib
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from . import _steps as steps
from ._lock import Lock
from ._processes import everywhere, first, gathered
from ._storage import CheckpointError, Json, dumps, flush, numbered, sealed
from ._training_state import TrainingState, TreeMismatchError
from ._tree import Params


class SaveSkippedError(CheckpointError):
    """There is this step already, or a later one."""


class Restored(NamedTuple):
    """A step that was restored. `skipped` tells of later ones that were damaged."""

    step: int
    params: Params
    opt_state: Any
    key: jax.Array | None
    data: Json
    skipped: tuple[str, ...]


class CheckpointManager:
    """The steps of one training run in one directory, written by Orbax.

    A step holds what trains, what else its nodes have and no base has (masks, random projections), the state of the
    optimizer, a key, the position in the data, and a manifest:
    nodes and their static fields, names, shapes and dtypes, and a checksum of every array, those of the base included.
    It is written beside the others, flushed, and then renamed: it is there as a whole or not at all.

    In a program of many processes each makes one, and calls `save`, `restore`, `wait` and `close` at the same points:
    each writes and reads its parts of the arrays. The directory is one that all of them see.

    **Arguments:**

    - `keep`: how many of the latest steps are kept.
    - `asynchronous`: whether `save` returns once the arrays are copied, and writes meanwhile. What goes wrong is then
      raised by the next `save`, `wait` or `close`, and only a step before which one of them has returned is safe.
    - `best`, `mode`: the name of a metric; the step with its lowest (`"min"`) or highest (`"max"`) value is kept, too.
      Values that are not finite, or not given, are never the best.
    - `read_only`: to restore from a directory, whoever writes to it.

    **Raises** `CheckpointError` if another process writes to the directory.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep: int = 3,
        asynchronous: bool = True,
        best: str | None = None,
        mode: Literal["min", "max"] = "min",
        read_only: bool = False,
    ):
        if keep < 1 or mode not in ("min", "max"):
            raise ValueError(f"keep is at least 1 and mode 'min' or 'max': not {keep}, {mode!r}.")
        self.directory = Path(directory).absolute()
        self._keep, self._asynchronous, self._metric = keep, asynchronous, best
        self._best = steps.Best(-1 if mode == "max" else 1)
        self._pending: int | None = None
        self._lock: Lock | None = None
        self._orbax: ocp.CheckpointManager | None = None
        if not read_only:
            everywhere(self._take, CheckpointError)
            self._orbax = self._open()
        self._best.values |= {step: steps.metrics(self.directory, step).get(best) for step in self.steps}

    @property
    def steps(self) -> tuple[int, ...]:
        """Those that are there as a whole, ascending."""
        return steps.committed(self.directory)

    @property
    def best_step(self) -> int | None:
        """The one with the best value of the metric `best`; `None` where none has one."""
        return self._best.of(self.steps)

    def save(
        self,
        step: int,
        params: Params,
        opt_state: Any,
        *,
        key: jax.Array | None = None,
        data: Json = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Save what `step` updates have made.

        **Arguments:**

        - `params`: the tuned tree; of its base, checksums are saved.
        - `key`: typed, or as raw numbers.
        - `data`: a JSON value that tells where in the data this is, such as the state of a Grain iterator; in a program
          of many processes, each gives its own.
        - `metrics`: numbers, for `best`.

        **Raises** `SaveSkippedError` where this step is, or a later one; `CheckpointError` where this step, or the one
        before it, could not be written: then earlier ones are as they were, and one can go on; `TypeError` for leaves,
        static fields and `data` that cannot be saved.
        """
        if self._orbax is None:
            raise CheckpointError(f"This manager of {self.directory} is closed, or was made with `read_only=True`.")
        self.wait()
        latest = first(self._latest, CheckpointError)
        if latest is not None and step <= latest:
            raise SaveSkippedError(
                f"Step {step} is not saved: {self.directory} has step {latest}, and saves are in ascending order. To "
                "do steps anew, move the directories of the old ones away, or name another directory."
            )
        state = TrainingState(params, opt_state, key)
        data = everywhere(lambda: json.loads(dumps(data)), CheckpointError)
        finite = {name: float(x) for name, x in (metrics or {}).items() if math.isfinite(x)}
        told = {"step": step, "data": gathered(data), "metrics": gathered(finite)[0]}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(numbered(state.arrays)),
            manifest=ocp.args.JsonSave(sealed(state.manifest() | told)),
        )
        self._pending, self._best.values[step] = step, told["metrics"].get(self._metric)
        with self._reported():
            if not self._orbax.save(step, args=args):
                raise SaveSkippedError(f"Orbax has not saved step {step} to {self.directory}, and does not say why.")
        if not self._asynchronous:
            self.wait()

    def wait(self) -> None:
        """Return once what was saved is on the disk.

        **Raises** `CheckpointError` where it could not be written.
        """
        if self._orbax is None:
            return
        with self._reported():
            self._orbax.wait_until_finished()
            if self._pending is not None and jax.process_index() == 0:
                flush(self.directory)
                steps.sweep(self.directory)
        self._pending = None

    def restore(self, params: Params, opt_state: Any, *, step: int | None = None) -> Restored | None:
        """The latest step that is whole, or `step`; `None` where there is none.

        A later step that is damaged is told of by a warning and in `skipped`, and renamed to `<step>.damaged`, so that
        training can come by it again.

        **Arguments:**

        - `params`, `opt_state`: the tuned tree over its base, and the optimizer's state, as they were before any step.
          They tell the structure, and every array comes back with the sharding that its leaf has. Leaves may be
          `jax.ShapeDtypeStruct`s, but for those that do not train.

        **Raises** `TreeMismatchError` for trees other than those saved, with every difference; `CheckpointError` where
        all steps are damaged, or `step` is; `FileNotFoundError` where it is not there.
        """
        self.wait()
        committed = first(lambda: list(self.steps), CheckpointError)
        if step is not None and step not in committed:
            there = ", ".join(map(str, committed)) or "none"
            raise FileNotFoundError(f"{self.directory} has no step {step}: it has {there}.")
        state, damaged = TrainingState(params, opt_state), {}
        for number in reversed(committed) if step is None else [step]:
            try:
                manifest, arrays = steps.read(self.directory, number, state)
            except TreeMismatchError:
                raise
            except CheckpointError as e:
                damaged[number] = f"Step {number}: {e}"
                continue
            data, *lost = _own(manifest["data"])
            skipped = (*damaged.values(), *lost)
            self._set_aside(damaged)
            if skipped:
                warnings.warn(f"Step {number} is restored. " + " ".join(skipped), stacklevel=2)
            return Restored(number, *state.restored(manifest, arrays), data, skipped)
        if damaged:
            raise CheckpointError("\n".join([f"{self.directory} has nothing to restore.", *damaged.values()]))
        return None

    def close(self) -> None:
        """Wait, and let others write. **Raises** `CheckpointError` as `wait` does."""
        try:
            self.wait()
        finally:
            if self._orbax is not None:
                self._orbax.close()
                self._orbax = None
            if self._lock is not None:
                self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self) -> None:
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self.directory / ".writer")
            steps.sweep(self.directory)

    def _open(self) -> ocp.CheckpointManager:
        """Orbax's manager, told to rename a step before it is deleted, and to have it flushed before it is there."""
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(self._keep), self._best]),
            todelete_subdir=steps.TRASH,
            save_root_metadata=False,
            lightweight_initialize=True,  # or one damaged file would keep it from starting
            async_options=ocp.AsyncOptions(post_finalization_callback=lambda: steps.flush_unfinished(self.directory)),
        )
        return ocp.CheckpointManager(self.directory, item_names=(steps.STATE, steps.MANIFEST), options=options)

    def _reopen(self) -> None:
        with contextlib.suppress(Exception):  # of the save that failed: it was told of
            self._orbax.close()
        self._orbax = self._open()

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Errors of a save as a `CheckpointError`, and the manager fit for the next one."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as e:
            self._best.values.pop(self._pending, None)
            if jax.process_index() == 0:
                steps.settle(self.directory)
                steps.sweep(self.directory)
            self._reopen()
            raise CheckpointError(
                f"Step {self._pending} was not saved to {self.directory}: {type(e).__name__}: {e}. Earlier steps are "
                "as they were, and later ones can be saved."
            ) from e

    def _latest(self) -> int | None:
        self._lock.check()
        return max(self.steps, default=None)

    def _set_aside(self, damaged: Iterable[int]) -> None:
        """Make room for steps of these numbers again."""
        if self._orbax is not None and damaged:
            first(lambda: steps.set_aside(self.directory, damaged), CheckpointError)
            self._reopen()


def _own(data: list[Json]) -> tuple[Json, *tuple[str, ...]]:
    """What this process had saved, and in words what cannot be told to whom it belongs."""
    if len(data) == jax.process_count():
        return (data[jax.process_index()],)
    if all(x == data[0] for x in data):
        return (data[0],)
    return None, f"`data` was that of {len(data)} processes, each with its own: now there are {jax.process_count()}."
