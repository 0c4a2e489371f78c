"""A directory that is written whole or not at all."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from .._storage import flush


@contextlib.contextmanager
def whole(directory: str | Path, *, mark: str, overwrite: bool) -> Iterator[Path]:
    """An empty directory to write to, which takes the place of `directory` when all has gone well.

    What was there is replaced as a whole. Between two renamings there is nothing at `directory`; whatever interrupts
    them leaves the old and the new beside it, under hidden names.

    **Raises** `FileExistsError` for what is there already, unless it is empty, or has a file `mark` and `overwrite` is
    set.
    """
    directory = Path(directory).resolve()
    taken = directory.exists() and not (directory.is_dir() and not any(directory.iterdir()))
    if taken and not (directory / mark).is_file():
        raise FileExistsError(f"{directory} has no {mark}: it is nothing that could be replaced. Name another.")
    if taken and not overwrite:
        raise FileExistsError(f"There is something at {directory}. Pass `overwrite=True` to replace it as a whole.")
    hidden = f".{directory.name}.{secrets.token_hex(4)}"  # another each time: what an interruption leaves is in no way
    new, old = directory.with_name(f"{hidden}.new"), directory.with_name(f"{hidden}.old")
    new.mkdir(parents=True)
    try:
        yield new
        for path in [*new.rglob("*"), new]:
            flush(path)
        if taken:
            os.rename(directory, old)
        os.rename(new, directory)
        flush(directory.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
