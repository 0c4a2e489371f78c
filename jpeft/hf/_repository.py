"""Directories of the Hugging Face kind: on a disk or on the hub, and the small files in them."""

import json
import re
from pathlib import Path
from typing import Any

from ._extra import extra


# What is read of a repository: never a pickle, and nothing in folders, which hold the same in other formats.
WANTED = [
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapters.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
]
NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
LARGEST_JSON = 64 * 2**20  # bytes


def locate(name: str | Path, *, revision: str | None = None) -> Path:
    """The directory `name`, or that to which the repository `name` of the Hugging Face hub is downloaded.

    **Raises** `FileNotFoundError` for what is neither, and a `ModuleNotFoundError` that says what to install.
    """
    if (directory := Path(name)).is_dir():
        return directory
    if directory.exists() or not (isinstance(name, str) and NAME.fullmatch(name)):
        raise FileNotFoundError(f"{name} is no directory. Give one, or the name of a repository, owner/name.")
    hub = extra("huggingface_hub")
    try:
        found = hub.snapshot_download(name, revision=revision, allow_patterns=WANTED, ignore_patterns=["*/*"])
    except (OSError, ValueError) as error:  # what it raises without a network, and for what is not there
        raise FileNotFoundError(f"{name} is no directory, and no repository that can be downloaded: {error}") from error
    return Path(found)


def file(directory: Path, name: str) -> Path | None:
    """The path of a file in a directory; `None` if it is not there.

    **Raises** `ValueError` for a name, or a link, that leaves the directory. The hub's cache is one of links: a
    directory `snapshots/<commit>` in it may link to its repository's `blobs`.
    """
    path = directory / name
    if Path(name).name != name:
        raise ValueError(f"{directory} names a file {name!r}, which is not in this directory itself.")
    if not path.is_file():
        return None
    home = directory.resolve()
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if path.resolve().parent not in homes:
        raise ValueError(f"{path} is a link out of its directory, to {path.resolve()}: put the file itself there.")
    return path


def read_json(directory: Path, name: str) -> dict[str, Any] | None:
    """The object in a JSON file of a directory; `None` if it is not there.

    **Raises** `ValueError` for anything else than one object whose names are all different.
    """
    path = file(directory, name)
    if path is None:
        return None
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path} is larger than {LARGEST_JSON} bytes: no such file is.")
    return parse(path.read_bytes(), path)


def parse(text: bytes, path: Path) -> dict[str, Any]:
    """The JSON object that is the text of a file. **Raises** as `read_json` does."""
    try:
        fields = json.loads(text, object_pairs_hook=_different)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is not a JSON object.")
    return fields


def _different(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{sorted({name for name in names if names.count(name) > 1})[:8]} are there twice")
    return fields
