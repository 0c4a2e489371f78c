"""The runner that all offline passes share: a carry that goes through batches, and survives an interruption."""

import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import jax
import numpy as np

from .. import _lazy
from .._node import is_node
from .._storage import MANIFEST, Json, read, record, write
from .._tree import Params


Batch = Any  # a pytree of arrays whose first axis is examples


compiled = functools.partial(jax.jit, donate_argnums=0)  # a step whose carry takes the place of the one before


class Running(TypedDict, total=False):
    """What every pass can be told of how it runs. See `run`."""

    progress: bool
    resume: str | os.PathLike | None
    save_every: int


def run(
    step: Callable[[Any, Params, Batch], Any],
    carry: Any,
    params: Params,
    batches: Iterable[Batch],
    *,
    what: str,
    options: Mapping[str, Any],
    progress: bool = True,
    resume: str | os.PathLike | None = None,
    save_every: int = 100,
) -> Any:
    """What `carry = step(carry, params, batch)` has become after all batches.

    Each carry takes the place of the one before, so that the memory is that of one, however many batches there are.

    **Arguments:**

    - `step`: by `compiled`, once for every shape of a batch; or a plain function that takes apart what it is given.
    - `params`: what does not change from batch to batch.
    - `what`, `options`: the name of the pass, and what its result depends on beside `params` and batches.
    - `progress`: whether a bar is shown, where standard error is a terminal and rich is installed.
    - `resume`: a directory in which the carry is kept every `save_every` batches and at the end. If it holds one, the
      batches that this has seen are skipped: they must be the same as before, in the same order. The result is bitwise
      that of a pass without interruption. It stays there once the pass is done: the same call then only counts the
      batches, and one with more of them goes on.

    **Raises** `ValueError` if there are no batches, or `resume` holds another pass, with all that differs; and
    `CheckpointError` if it is damaged.
    """
    kept = None if resume is None else _Kept(Path(resume).absolute(), what, carry, params, options)
    done, carry = (0, carry) if kept is None else kept.load(carry)
    count = 0
    for count, batch in enumerate(shown(batches, what, progress), 1):
        if count > done:
            jax.block_until_ready(carry)  # or batches would queue up on the device
            carry = step(carry, params, batch)
            if kept is not None and count % save_every == 0:
                kept.save(carry, count, batch)
        elif count == done:
            kept.check(batch)
    if count < max(done, 1):
        raise ValueError(f"`{what}` has no batches." if not done else kept.fault(f"had {done} batches, not {count}"))
    if kept is not None and count > done and count % save_every:
        kept.save(carry, count, batch)
    return carry


def shown(batches: Iterable[Batch], what: str, progress: bool) -> Iterable[Batch]:
    """The batches, with a bar that tells how many of them are through."""
    if not (progress and sys.stderr.isatty()):
        return batches
    try:
        from rich.console import Console
        from rich.progress import track
    except ModuleNotFoundError:
        return batches
    return track(batches, what, console=Console(stderr=True), transient=True)


class _Kept:
    """The carry of a pass in a directory, with what tells the pass from others."""

    def __init__(self, directory: Path, what: str, carry: Any, params: Params, options: Mapping[str, Any]):
        self.directory = directory
        self.setup: dict[str, Json] = {
            "pass": what,
            "options": {name: repr(x) for name, x in options.items()},
            "carry": {name: [list(np.shape(x)), str(x.dtype)] for name, x in _named(carry)},
            "nodes": _nodes(params),
            "results": _nodes(carry),
            "parameters": {name: record(_lazy.read(x)) for name, x in _named(params)},
        }

    def fault(self, why: str) -> str:
        return f"{self.directory} holds another pass: it {why}. Name another directory, or remove this one."

    def load(self, like: Any) -> tuple[int, Any]:
        """How many batches were done, and the carry after them; 0 and `like` where there is nothing."""
        if not (self.directory / MANIFEST).exists():
            return 0, like
        content, arrays = read(self.directory)
        if (was := content.get("setup")) != self.setup:
            raise ValueError(self.fault("; ".join(_differences(was or {}, self.setup))))
        self.last = content["last"]

        def place(path, x):
            array = arrays[jax.tree_util.keystr(path)]
            return jax.device_put(array, x.sharding) if x.committed else array

        return content["done"], jax.tree_util.tree_map_with_path(place, like)

    def save(self, carry: Any, done: int, batch: Batch) -> None:
        content = {"setup": self.setup, "done": done, "last": _records(batch)}
        write(self.directory, dict(_named(carry)), content, overwrite=True)

    def check(self, batch: Batch) -> None:
        """**Raises** `ValueError` if the last batch that was done was another."""
        if _records(batch) != self.last:
            raise ValueError(self.fault("has seen other batches, or in another order"))


def _named(tree: Any, is_leaf: Callable | None = None) -> Iterator[tuple[str, Any]]:
    return ((jax.tree_util.keystr(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf))


def _nodes(tree: Any) -> dict[str, Json]:
    """The nodes of a tree, with their static fields."""
    return {name: str(jax.tree.structure(x)) for name, x in _named(tree, is_node) if is_node(x)}


def _records(batch: Batch) -> dict[str, Json]:
    return {name: record(_lazy.read(x)) for name, x in _named(batch)}


def _differences(was: dict[str, Json], now: dict[str, Json]) -> Iterator[str]:
    for part, new in now.items():
        old = was.get(part)
        if isinstance(new, dict) and isinstance(old, dict):
            names = [name for name in (*new, *(old.keys() - new.keys())) if new.get(name) != old.get(name)]
            if names:
                yield f"had other {part}: {', '.join(names[:8])}"
        elif old != new:
            yield f"had {part} {old}, not {new}"
