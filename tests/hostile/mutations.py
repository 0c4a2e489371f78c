"""Files changed at random: bytes, fields of JSON, headers of tensors, and files for one another."""

import copy
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any


Random = random.Random

DEEP = [[]]
for _ in range(40):
    DEEP = [DEEP]

# What a field may become. Text that no JSON writer makes stands in place of its marker.
MARKERS = {"<nan>": "NaN", "<inf>": "Infinity", "<1e999>": "1e999", "<deep>": "[" * 5000 + "]" * 5000}
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 10**18, 10**400, 0.5, -0.0, 1e300, "", "a", "0",
    "../../etc/passwd", "/etc/passwd", "os", "a\0b", "\ud800", "x" * 10_000, "((a+))+$", "(a|a)*b", ".*", "(", [], {},
    [[]], {"": {}}, [None], ["q_proj"], {"q_proj": 3}, {"(a|a)*b": 1}, [1] * 1000, DEEP, *MARKERS,
)  # fmt: skip


SEALED = False  # whether a manifest that was changed gets a digest that is right again


def mutate(rng: Random, directory: Path) -> str:
    """Change one file of a directory, or several times; what was done, in words."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    path = rng.choice(files)
    steps = [_step(rng, path, files) for _ in range(rng.choice([1, 1, 1, 2, 4]))]
    return f"{path.relative_to(directory)}: {', '.join(steps)}"


def _step(rng: Random, path: Path, files: list[Path]) -> str:
    if not path.is_file():
        return "gone"
    ways = [*BYTES, *BYTES, *[_swapped] * 2, _removed if rng.random() < 0.5 else _linked]
    if path.suffix == ".json":
        ways += [_json] * 16
    if path.suffix == ".safetensors":
        ways += [_header] * 12 + [_payload] * 4
    way = rng.choice(ways)
    if way in BYTES:
        path.write_bytes(way(rng, path.read_bytes()))
    else:
        way(rng, path, files)
    return way.__name__.strip("_")


def flipped(rng: Random, data: bytes) -> bytes:
    x = bytearray(data)
    for _ in range(rng.choice([1, 1, 8])):
        if x:
            # as often near the start, where headers are
            x[rng.randrange(rng.choice([len(x), min(len(x), 512)]))] ^= 1 << rng.randrange(8)
    return bytes(x)


def written(rng: Random, data: bytes) -> bytes:
    start, size = _span(rng, data)
    return data[:start] + bytes(rng.randrange(256) for _ in range(size)) + data[start + size :]


def truncated(rng: Random, data: bytes) -> bytes:
    return data[: rng.choice([0, 1, 7, 8, 9, rng.randrange(len(data) + 1), max(0, len(data) - 1)])]


def extended(rng: Random, data: bytes) -> bytes:
    return data + bytes(rng.choice([1, 8, 4096]))


def spliced(rng: Random, data: bytes) -> bytes:
    start, size = _span(rng, data)
    other = rng.randrange(len(data) + 1)
    return data[:other] + data[start : start + size] + data[other:]


def deleted(rng: Random, data: bytes) -> bytes:
    start, size = _span(rng, data)
    return data[:start] + data[start + size :]


def _span(rng: Random, data: bytes) -> tuple[int, int]:
    return rng.randrange(len(data) + 1), rng.choice([1, 8, 64, 512])


BYTES: list[Callable] = [flipped, written, truncated, extended, spliced, deleted]


def _swapped(rng: Random, path: Path, files: list[Path]) -> None:
    other = rng.choice([file for file in files if file.is_file()])
    path.write_bytes(other.read_bytes())


def _removed(rng: Random, path: Path, files: list[Path]) -> None:
    path.unlink()


def _linked(rng: Random, path: Path, files: list[Path]) -> None:
    path.unlink()
    path.symlink_to(rng.choice(["/etc/passwd", "/dev/zero", path.name, "../elsewhere", "."]))


def _json(rng: Random, path: Path, files: list[Path]) -> None:
    """One field of a JSON file."""
    try:
        fields = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return
    path.write_text(_text(rng, _edited(rng, fields)), errors="surrogatepass")


def _header(rng: Random, path: Path, files: list[Path]) -> None:
    """One field of a header of tensors, whose length is right again."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    try:
        fields = json.loads(data[8 : 8 + size])
    except (ValueError, RecursionError):
        return
    if isinstance(fields, dict) and fields and rng.random() < 0.5:
        name = rng.choice(list(fields))
        _of_tensor(rng, fields, name)
    else:
        fields = _edited(rng, fields)
    text = _text(rng, fields).encode(errors="surrogatepass")
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def _of_tensor(rng: Random, fields: dict[str, Any], name: str) -> None:
    entry = fields[name] if isinstance(fields[name], dict) else {}
    match rng.randrange(5):
        case 0:
            entry["dtype"] = rng.choice(["F64", "F32", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "C64", "X"])
        case 1 if entry.get("shape"):
            entry["shape"] = rng.choice([entry["shape"][::-1], [*entry["shape"], 1], [1] * 70, [-1], [2**62, 4], [0]])
        case 2:
            entry["data_offsets"] = [rng.choice([0, 4, 8, 2**63]), rng.choice([0, 8, 64, 2**64 - 1])]
        case 3:
            names = [*fields, "../../etc/passwd", "a\0b", "x" * 100_000, "", "lora_A", "\n"]
            fields[rng.choice(names)] = fields.pop(name)
        case _:
            del fields[name]


def _payload(rng: Random, path: Path, files: list[Path]) -> None:
    """Four bytes of tensors become NaN, infinity, or the largest number there is."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    if start + 8 < len(data):
        at = start + 4 * rng.randrange((len(data) - start) // 4)
        data[at : at + 4] = rng.choice([b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f", b"\0\0\x80\xff"])
    path.write_bytes(data)


def _edited(rng: Random, x: Any) -> Any:
    """JSON with one value or name in it replaced, added or taken away, at any depth."""
    if not isinstance(x, dict | list) or not x or rng.random() < 0.15:
        return copy.deepcopy(rng.choice(VALUES))
    at = rng.choice([*x]) if isinstance(x, dict) else rng.randrange(len(x))
    match rng.randrange(8):
        case 0:
            del x[at]
        case 1 if isinstance(x, dict):
            x[rng.choice(["", "new", "r", "a\0b", "x" * 1000, *x])] = copy.deepcopy(rng.choice(VALUES))
        case 1:
            x.insert(at, copy.deepcopy(rng.choice(VALUES)))
        case 2 | 3:
            x[at] = copy.deepcopy(rng.choice(VALUES))
        case 4:
            x[at] = copy.deepcopy(x[rng.choice([*x]) if isinstance(x, dict) else rng.randrange(len(x))])
        case _:
            x[at] = _edited(rng, x[at])
    return x


def _text(rng: Random, fields: Any) -> str:
    if SEALED and isinstance(fields, dict) and "digest" in fields:
        fields = seal(fields)
    text = json.dumps(fields)
    for marker, literal in MARKERS.items():
        text = text.replace(json.dumps(marker), literal)
    if rng.random() < 0.05:
        text = text.replace("{", '{"r": 1, "r": 2, ', 1)
    return text


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest with the digest that a stranger, too, can make of it."""
    content = {name: x for name, x in manifest.items() if name != "digest"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return content | {"digest": hashlib.sha256(text.encode()).hexdigest()}
