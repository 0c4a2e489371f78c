"""A directory of named arrays and a manifest, that is never half written and never wrong unnoticed.

    manifest.json   what the arrays are, the directory that they are in, digests of its files, and a digest of itself
    arrays-0        the arrays, written by Orbax

Writing again fills the other slot, `arrays-1`, and commits by replacing the manifest, which is atomic: whatever
interrupts it, the manifest names arrays that are whole.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ._checksum import checksum
from ._processes import Json, everywhere, first


FORMAT = 1
MANIFEST = "manifest.json"
SLOTS = "arrays-0", "arrays-1"


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or does not fit the tree it was to be restored onto."""


def record(x: Any) -> dict[str, Json]:
    """What tells an array from others: shape, dtype and checksum."""
    x = jnp.asarray(x)
    return {"shape": list(x.shape), "dtype": str(x.dtype), "sum": checksum(x)}


def dumps(x: Json) -> str:
    """The same text for the same content."""
    return json.dumps(x, sort_keys=True, separators=(",", ":"))


def write(directory: Path, arrays: dict[str, Any], content: dict[str, Json], *, overwrite: bool) -> int:
    """Write arrays, by name, and what else the manifest says; return the bytes on disk.

    Every process of a program calls it: each writes its parts of the arrays, and the first one all else.

    **Raises** `FileExistsError` for what is there already, unless it is a checkpoint and `overwrite` is set.
    """
    live = first(lambda: _vacated(directory, overwrite), CheckpointError)
    slot = SLOTS[live == SLOTS[0]]
    kept = {name: record(x) for name, x in arrays.items()}

    def commit() -> int:
        files = _files(directory / slot)
        _commit(directory, content | {"slot": slot, "files": files, "arrays": kept})
        written = directory / MANIFEST, *(directory / slot).rglob("*")
        return sum(file.stat().st_size for file in written if file.is_file())

    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(directory / slot, numbered(arrays))
        return first(commit, CheckpointError)
    finally:
        if jax.process_index() == 0:
            _sweep(directory, _slot(directory))


def _vacated(directory: Path, overwrite: bool) -> str | None:
    """Make the directory, with no arrays in it but those that must not be touched: their slot."""
    there = os.listdir(directory) if directory.exists() else []
    if MANIFEST in there and not overwrite:
        raise FileExistsError(f"There is a checkpoint at {directory}. Pass `overwrite=True` to replace it.")
    foreign = [name for name in there if not name.startswith(("arrays-", MANIFEST))]
    if foreign and MANIFEST not in there:
        raise FileExistsError(f"{directory} is no checkpoint: it holds {', '.join(sorted(foreign)[:4])}. Name another.")
    live = _slot(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _sweep(directory, live)
    return live


def read(directory: Path) -> tuple[dict[str, Json], dict[str, jax.Array]]:
    """The manifest, and the arrays by name.

    **Raises** `FileNotFoundError` if there is nothing, `CheckpointError` for anything that is not as it was written.
    """
    return everywhere(lambda: _read(directory), CheckpointError)


@contextlib.contextmanager
def understood(directory: Path) -> Iterator[None]:
    """Within it, what a manifest never holds is a `CheckpointError`: it may be of anyone."""
    try:
        yield
    except CheckpointError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, MemoryError, RecursionError) as e:
        what = f"{type(e).__name__}, {' '.join(str(e).split())[:200]}"
        raise CheckpointError(f"{directory}: its {MANIFEST} tells of no checkpoint ({what}).") from e


def _read(directory: Path) -> tuple[dict[str, Json], dict[str, jax.Array]]:
    with understood(directory):
        return _arrays_of(directory, _manifest(directory))


def _arrays_of(directory: Path, manifest: dict[str, Json]) -> tuple[dict[str, Json], dict[str, jax.Array]]:
    if manifest["slot"] not in SLOTS:
        raise CheckpointError(f"{directory / MANIFEST} is damaged: no arrays are in {manifest['slot']!r}.")
    slot, kept = directory / manifest["slot"], manifest["arrays"]
    found = _files(slot)  # Orbax has no checksums: of damaged files it would return other numbers
    bad = [name for name, digest in manifest["files"].items() if found.get(name) != digest]
    if bad:
        raise CheckpointError("; ".join(f"{slot / x} is {'damaged' if x in found else 'missing'}" for x in bad) + ".")
    # as NumPy arrays: JAX ones would be bound to one device, or to those that they were saved from
    stored = stored_arrays(slot, {name: np.empty(x["shape"], jnp.dtype(x["dtype"])) for name, x in kept.items()})
    arrays = {name: jnp.asarray(x) for name, x in stored.items()}
    check_arrays(kept, arrays, slot)
    return manifest, arrays


def stored_arrays(directory: Path, like: dict[str, Any]) -> dict[str, Any]:
    """The arrays that Orbax wrote there as `numbered`: NumPy arrays, or JAX ones for a `ShapeDtypeStruct`.

    **Raises** `CheckpointError` where Orbax fails, in whatever way.
    """
    handler = ocp.StandardCheckpointHandler()  # and no `Checkpointer`: that waits for processes which have failed
    try:
        stored = handler.restore(directory, args=ocp.args.StandardRestore(numbered(like)))
    except Exception as e:  # of a damaged file Orbax raises nearly anything
        raise CheckpointError(f"{directory} is damaged: {type(e).__name__}, {' '.join(str(e).split())[:200]}") from e
    finally:
        handler.close()
    return like | {name: stored[number] for number, name in _numbers(like).items()}


def check_arrays(kept: dict[str, Json], arrays: dict[str, jax.Array], where: Path) -> None:
    """**Raises** `CheckpointError` for arrays that are not those of which there are records."""
    bad = [f"{name} {x['dtype']}{x['shape']}" for name, x in kept.items() if x | record(arrays[name]) != x]
    if bad:
        what = f"{len(bad)} of {len(kept)} arrays are read otherwise than written"
        raise CheckpointError(f"{where} is damaged: {what}: {', '.join(bad[:8])}.")


def _files(slot: Path) -> dict[str, str]:
    """The SHA-256 of every file."""
    digests = {}
    for file in (file for file in slot.rglob("*") if file.is_file()):
        with file.open("rb") as stream:
            digests[file.relative_to(slot).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests


def _manifest(directory: Path) -> dict[str, Json]:
    if not directory.exists():
        raise FileNotFoundError(f"There is no checkpoint at {directory}.")
    file = directory / MANIFEST
    if not file.exists():
        raise CheckpointError(f"{directory} has no {MANIFEST}: it is no checkpoint, or its first save was interrupted.")
    return unsealed(file)


def sealed(manifest: dict[str, Json]) -> dict[str, Json]:
    """The manifest with the number of its format, and the digest of all of it."""
    manifest = {"format": FORMAT} | manifest
    return manifest | {"digest": _digest(manifest)}


def unsealed(file: Path) -> dict[str, Json]:
    """The manifest that was `sealed` and written.

    **Raises** `CheckpointError` for anything else, and one in another format.
    """
    try:
        manifest = json.loads(file.read_text())
        digest = manifest.pop("digest")
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError) as e:
        raise CheckpointError(f"{file} is damaged: it cannot be read.") from e
    if digest != _digest(manifest):
        raise CheckpointError(f"{file} is damaged, or was edited: its digest is another.")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{file} is in format {manifest['format']}, this version reads {FORMAT}: update jpeft.")
    return manifest


def _digest(manifest: dict[str, Json]) -> str:
    return hashlib.sha256(dumps(manifest).encode()).hexdigest()


def _slot(directory: Path) -> str | None:
    """The arrays that must not be touched."""
    try:
        return _manifest(directory)["slot"]
    except (OSError, CheckpointError):
        return None


def numbered(arrays: dict[str, Any]) -> dict[str, Any]:
    """What Orbax stores: no empty arrays, which it refuses, and under numbers, for it takes `a/b` and `a.b` for one."""
    return {number: _writable(arrays[name]) for number, name in _numbers(arrays).items()}


def _numbers(arrays: dict[str, Any]) -> dict[str, str]:
    return {str(n): name for n, name in enumerate(sorted(arrays)) if 0 not in arrays[name].shape}


def _writable(x: Any) -> Any:
    """Among several processes, Orbax writes the arrays of one alone from NumPy, and else refuses them."""
    own = isinstance(x, jax.Array) and jax.process_count() > 1 and x.is_fully_addressable
    return np.asarray(x) if own else x


def _commit(directory: Path, manifest: dict[str, Json]) -> None:
    new = directory / f"{MANIFEST}.new"
    new.write_text(dumps(sealed(manifest)))
    slot = directory / manifest["slot"]
    for file in (new, *slot.rglob("*"), slot, directory):  # Orbax flushes only some of its files
        flush(file)
    os.replace(new, directory / MANIFEST)
    flush(directory)


def flush(file: Path) -> None:
    """Wait until a file, or a directory, is on the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(directory: Path, live: str | None) -> None:
    """Remove what saves have left, but for the arrays that are `live`."""
    for left in directory.glob("arrays-*"):
        if left.name != live:
            shutil.rmtree(left)
