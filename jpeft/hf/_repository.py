"""Directories of the Hugging Face kind: on a disk or on the hub, and the small files in them."""

import collections
import json
import math
import re
from pathlib import Path
from typing import Any

from ._errors import FormatError
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
BARE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}")  # what files in a directory may be called
FOREIGN = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz", ".npy", ".msgpack", ".h5", ".yaml", ".yml"}
LARGEST = 64 * 2**20  # bytes of a file that is read whole
DEEPEST, LONGEST = 32, 300  # levels of JSON, and digits of a number: more than a float has room for


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

    **Raises** `FormatError` for a name, or a link, that leaves the directory. The hub's cache is one of links: a
    directory `snapshots/<commit>` in it may link to its repository's `blobs`.
    """
    path = directory / name
    if not BARE.fullmatch(name):
        raise FormatError(f"{directory} names a file {name!r}, which is not in this directory itself.")
    if not path.is_file():
        return None
    home = directory.resolve()
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if path.resolve().parent not in homes:
        raise FormatError(f"{path} is a link out of its directory, to {path.resolve()}: put the file itself there.")
    return path


def foreign(directory: Path) -> str:
    """A sentence about files in formats that are never read, and how to make such that are; empty without them."""
    names = sorted(path.name for path in directory.iterdir() if path.suffix in FOREIGN)
    if not names:
        return ""
    return (
        f" It has {', '.join(names[:4])}, in formats that are never read here, such as pickles, which run any code "
        "that is in them. Where you trust it, load it with what wrote it and save it as safetensors: "
        "`model.save_pretrained(directory)`."
    )


def read_bytes(directory: Path, name: str, *, largest: int | None = None) -> bytes | None:
    """What is in a small file of a directory; `None` if it is not there.

    **Raises** `FormatError` for a file of more than `largest` bytes.
    """
    path, largest = file(directory, name), largest or LARGEST
    if path is None:
        return None
    if path.stat().st_size > largest:
        raise FormatError(f"{path} is larger than {largest} bytes: no such file is.")
    return path.read_bytes()


def read_json(directory: Path, name: str, *, largest: int | None = None) -> dict[str, Any] | None:
    """The object in a JSON file of a directory; `None` if it is not there.

    **Raises** `FormatError` as `read_bytes` and `parse` do.
    """
    text = read_bytes(directory, name, largest=largest)
    return None if text is None else parse(text, directory / name)


def parse(text: bytes, path: Path) -> dict[str, Any]:
    """The JSON object that is the text of a file.

    **Raises** `FormatError` for anything else, for names that are there twice, for NaN and infinity, which JSON does
    not have, and for numbers and nesting beyond reason.
    """
    numbers = {"parse_int": _integer, "parse_float": _finite, "parse_constant": _finite}
    try:
        fields = json.loads(text.decode("utf-8"), object_pairs_hook=_different, **numbers)
        deep = _depth(fields) > DEEPEST
        if re.search(rb"\\u[dD][89a-fA-F]", text):  # half a character: alone, no tokenizer takes it
            json.dumps(fields, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON: {error}") from error
    if deep:
        raise FormatError(f"{path} is nested deeper than {DEEPEST} levels.")
    if not isinstance(fields, dict):
        raise FormatError(f"{path} is not a JSON object.")
    return fields


def _different(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        count = collections.Counter(name for name, _ in pairs)
        raise ValueError(f"{sorted(name for name in count if count[name] > 1)[:8]} are there twice")
    return fields


def _integer(digits: str) -> int:
    if len(digits) > LONGEST:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _finite(text: str) -> float:
    if not math.isfinite(x := float(text)):
        raise ValueError(f"{text} is no finite number")
    return x


def _depth(x: Any) -> int:
    if not isinstance(x, dict | list):
        return 0
    return 1 + max(map(_depth, x.values() if isinstance(x, dict) else x), default=0)
