"""A directory of named arrays and a manifest, that is never half written and never wrong unnoticed.

    manifest.json   what the arrays are, the directory that they are in, digests of its files, and a digest of itself
    arrays-0        the arrays, written by Orbax

Writing again fills the other slot, `arrays-1`, and commits by replacing the manifest, which is atomic: whatever
interrupts it, the manifest names arrays that are whole.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ._checksum import checksum


Json = Any
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

    **Raises** `FileExistsError` for what is there already, unless it is a checkpoint and `overwrite` is set.
    """
    there = os.listdir(directory) if directory.exists() else []
    if MANIFEST in there and not overwrite:
        raise FileExistsError(f"There is a checkpoint at {directory}. Pass `overwrite=True` to replace it.")
    foreign = [name for name in there if not name.startswith(("arrays-", MANIFEST))]
    if foreign and MANIFEST not in there:
        raise FileExistsError(f"{directory} is no checkpoint: it holds {', '.join(sorted(foreign)[:4])}. Name another.")
    live = _slot(directory)
    slot = SLOTS[live == SLOTS[0]]
    kept = {name: record(x) for name, x in arrays.items()}
    directory.mkdir(parents=True, exist_ok=True)
    try:
        _sweep(directory, live)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(directory / slot, {number: arrays[name] for number, name in _numbered(kept).items()})
        files = _files(directory / slot)
        _commit(directory, content | {"format": FORMAT, "slot": slot, "files": files, "arrays": kept})
        live = slot
    finally:
        _sweep(directory, live)
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def read(directory: Path) -> tuple[dict[str, Json], dict[str, jax.Array]]:
    """The manifest, and the arrays by name.

    **Raises** `FileNotFoundError` if there is nothing, `CheckpointError` for anything that is not as it was written.
    """
    manifest = _manifest(directory)
    slot, kept = directory / manifest["slot"], manifest["arrays"]
    found = _files(slot)  # Orbax has no checksums: of damaged files it would return other numbers
    bad = [name for name, digest in manifest["files"].items() if found.get(name) != digest]
    if bad:
        raise CheckpointError("; ".join(f"{slot / x} is {'damaged' if x in found else 'missing'}" for x in bad) + ".")
    numbered = _numbered(kept)
    # as NumPy arrays: JAX ones would be bound to one device, or to those that they were saved from
    arrays = {name: np.empty(x["shape"], jnp.dtype(x["dtype"])) for name, x in kept.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.restore(slot, {number: arrays[name] for number, name in numbered.items()})
    arrays |= {name: stored[number] for number, name in numbered.items()}
    arrays = {name: jnp.asarray(x) for name, x in arrays.items()}
    bad = [f"{name} {x['dtype']}{x['shape']}" for name, x in kept.items() if record(arrays[name]) != x]
    if bad:
        raise CheckpointError(f"{len(bad)} of {len(kept)} arrays are read otherwise than written: {', '.join(bad)}.")
    return manifest, arrays


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
    try:
        manifest = json.loads(file.read_text())
        digest = manifest.pop("digest")
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as e:
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


def _numbered(kept: dict[str, Json]) -> dict[str, str]:
    """What Orbax stores: no empty arrays, which it refuses, and under numbers, for it takes `a/b` and `a.b` for one."""
    return {str(n): name for n, name in enumerate(sorted(kept)) if 0 not in kept[name]["shape"]}


def _commit(directory: Path, manifest: dict[str, Json]) -> None:
    new = directory / f"{MANIFEST}.new"
    new.write_text(dumps(manifest | {"digest": _digest(manifest)}))
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
