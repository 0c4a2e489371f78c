"""A run directory: config.json, metrics.jsonl, the training state, and in the end the adapter and the curves."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jpeft._storage import MANIFEST, CheckpointError, read, write
from jpeft.cli._arguments import Arguments, option
from jpeft.cli._errors import UserError


Row = dict[str, Any]
STATE, BEST = "state", "best"  # directories of arrays
_NOT_KEPT = ("output", "resume")


def new_directory(arguments: Arguments) -> Path:
    """The directory that the arguments name, or the first free one in runs/.

    Raises a UserError for one that holds anything.
    """
    if arguments.output is None:
        number = 1
        while (path := Path("runs") / f"{arguments.method}-{number}").exists():
            number += 1
        return path
    path = arguments.output
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists and is not empty; name another --output, or go on with its run: --resume")
    return path


def saved_arguments(arguments: Arguments) -> Arguments:
    """The arguments of the run to be resumed.

    Raises a UserError if there is no such run.
    """
    if arguments.output is None:
        raise UserError("--resume needs the run directory: --output DIR")
    path = arguments.output / "config.json"
    try:
        fields = json.loads(path.read_text())["arguments"]
        paths = {name: Path(fields[name]) for name in ("model", "data", "eval_data") if fields[name] is not None}
        return Arguments(**fields | paths, output=arguments.output, resume=True)
    except OSError as error:
        raise UserError(f"there is no run to resume in {arguments.output}: cannot read config.json") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no config of this version of `jpeft finetune`") from error


def check_same(given: Arguments, saved: Arguments) -> None:
    """Raises a UserError with every argument that differs from that of the run to be resumed."""
    pairs = [(f.name, getattr(given, f.name), getattr(saved, f.name)) for f in dataclasses.fields(Arguments)]
    faults = [f"{option(name)} is {new}, was {old}" for name, new, old in pairs if new != old]
    if faults:
        raise UserError(f"a resumed run keeps its arguments; in {saved.output}: {'; '.join(faults)}")


class Run:
    """What is written while training: nothing of it depends on when the run was interrupted."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.rows: list[Row] = []
        self._metrics = directory / "metrics.jsonl"

    def start(self, arguments: Arguments, data: Row) -> None:
        """Write config.json: the arguments, and `data`, what tells the texts and labels from others."""
        self.directory.mkdir(parents=True, exist_ok=True)
        fields = {name: str(value) if isinstance(value, Path) else value
                  for name, value in dataclasses.asdict(arguments).items() if name not in _NOT_KEPT}  # fmt: skip
        _replace(self.directory / "config.json", json.dumps({"arguments": fields, "data": data}, indent=2) + "\n")

    def check_data(self, data: Row) -> None:
        """Raises a UserError if the run was started with other texts or labels."""
        if json.loads((self.directory / "config.json").read_text())["data"] != data:
            raise UserError(f"the texts are not those that the run in {self.directory} was started with")

    def save(self, name: str, step: int, tree: Any) -> None:
        """Keep arrays as they are after `step` steps, in place of those of that name."""
        arrays = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
        write((self.directory / name).absolute(), arrays, {"step": step}, overwrite=True)

    def keep_batch(self, step: int, batch: Any) -> Path:
        """Write a batch's arrays down, to be looked at; return the file."""
        file = self.directory / f"batch-{step}.safetensors"
        arrays = jax.tree_util.tree_leaves_with_path(batch)
        save_file({jax.tree_util.keystr(path, simple=True): np.ascontiguousarray(x) for path, x in arrays}, file)
        return file

    def read(self, name: str, like: Any) -> tuple[int, Any]:
        """The number of steps after which arrays were saved, and those; `(0, None)` where there are none.

        Raises a UserError for files that are damaged.
        """
        path = (self.directory / name).absolute()
        if not (path / MANIFEST).exists():
            return 0, None
        try:
            content, arrays = read(path)
            return content["step"], jax.tree_util.tree_map_with_path(
                lambda path, _: arrays[jax.tree_util.keystr(path)], like
            )
        except (OSError, CheckpointError, KeyError) as error:
            raise self._broken(error) from error

    def load(self, like: Any) -> tuple[int, Any]:
        """The state of training as `read` returns it.

        Rows of metrics.jsonl that were written later are dropped: those steps are made again. Raises a UserError for
        files that are damaged.
        """
        step, state = self.read(STATE, like)
        if state is not None:
            try:
                rows = map(_parse, self._metrics.read_text().splitlines())
            except OSError as error:
                raise self._broken(error) from error
            self.rows = [row for row in rows if row and row["step"] <= step and "adapter_bytes" not in row]
        _replace(self._metrics, "".join(map(_line, self.rows)))
        return step, state

    def _broken(self, error: Exception) -> UserError:
        return UserError(f"the run in {self.directory} cannot go on: {error}")

    def log(self, **row: Any) -> Row:
        """Append a row to metrics.jsonl, with null for a number that is not finite."""
        row = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in row.items()}
        self.rows.append(row)
        with self._metrics.open("a") as file:
            file.write(_line(row))
        return row

    def evaluations(self) -> list[Row]:
        """The rows of evaluations, in order."""
        return [row for row in self.rows if "evaluation_loss" in row]

    def best(self) -> Row | None:
        """The first row of an evaluation with the lowest loss; `None` where no loss was finite."""
        finite = [row for row in self.evaluations() if row["evaluation_loss"] is not None]
        return min(finite, key=lambda row: row["evaluation_loss"], default=None)

    def stale(self) -> int:
        """How many evaluations came after the best; all of them where there is none."""
        rows, best = self.evaluations(), self.best()
        return len(rows) if best is None else len(rows) - 1 - rows.index(best)


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"


def _parse(line: str) -> Row | None:
    try:
        return json.loads(line)
    except ValueError:
        return None  # a line that a kill cut off


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text)
    os.replace(temporary, path)
