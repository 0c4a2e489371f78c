"""Damage one file of a directory of steps: the latest whole step is restored, and no other numbers ever.

    python tests/faults/corrupt.py --count 1000 --seed 0
"""

import collections
import os
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import tyro
from rich.progress import track
from tiny_run import check, save, trees

import jpeft


STEPS = 1, 2, 3


def truncated(at: random.Random, content: bytes, _: bytes) -> bytes:
    return content[: at.randrange(max(len(content), 1))]


def flipped(at: random.Random, content: bytes, _: bytes) -> bytes:
    damaged, place = bytearray(content), at.randrange(len(content))
    damaged[place] ^= 1 << at.randrange(8)
    return bytes(damaged)


def overwritten(at: random.Random, content: bytes, _: bytes) -> bytes:
    """A stretch of random bytes in place of others, or after all."""
    place, some = at.randrange(len(content) + 1), at.randbytes(at.randint(1, 64))
    return content[:place] + some + content[place + len(some) :]


def emptied(at: random.Random, content: bytes, _: bytes) -> bytes:
    return b""


def swapped(at: random.Random, content: bytes, other: bytes) -> bytes:
    return other


def removed(at: random.Random, content: bytes, _: bytes) -> None:
    return None


WAYS: tuple[Callable, ...] = truncated, flipped, flipped, overwritten, emptied, swapped, removed


def main(count: int = 1000, seed: int = 0) -> None:
    """Damage `count` times one file, mostly of the latest step, large ones more often, and restore."""
    at, outcomes = random.Random(seed), collections.Counter()
    params, opt_state = trees()
    with tempfile.TemporaryDirectory() as scratch:
        whole, directory = Path(scratch) / "whole", Path(scratch) / "run"
        with jpeft.CheckpointManager(whole, keep=len(STEPS), asynchronous=False) as manager:
            for step in STEPS:
                save(manager, step, params, opt_state)
        shutil.copytree(whole, directory)
        files = {s: [f.relative_to(whole) for f in sorted((whole / str(s)).rglob("*")) if f.is_file()] for s in STEPS}
        for _ in track(range(count), "corruptions", auto_refresh=False):
            step = at.choice((1, 2, 3, 3, 3, 3))
            sizes = [(whole / file).stat().st_size for file in files[step]]
            file = at.choice(files[step]) if at.random() < 0.5 else at.choices(files[step], sizes)[0]
            content = (whole / file).read_bytes()
            other = (whole / at.choice(files[at.choice(STEPS)])).read_bytes()
            damaged = at.choice([way for way in WAYS if content or way is not flipped])(at, content, other)
            (directory / file).unlink() if damaged is None else (directory / file).write_bytes(damaged)
            outcomes[outcome(directory, step, params, opt_state, read_only=at.random() < 0.8)] += 1
            if (directory / str(step)).exists():
                (directory / file).write_bytes(content)
            else:
                shutil.copytree(whole / str(step), directory / str(step))
            for left in directory.glob("*.damaged*"):
                shutil.rmtree(left)
    for what, times in sorted(outcomes.items()):
        print(f"{times:6} {what}")
    bad = sum(times for what, times in outcomes.items() if what.startswith("FAULT"))
    print(f"corruptions: {count}, faults: {bad}")
    raise SystemExit(bad > 0)


def outcome(directory: Path, step: int, *trees, read_only: bool) -> str:
    """What becomes of a restore with `step` damaged, in words; `FAULT ...` for what must not be."""
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            with jpeft.CheckpointManager(directory, keep=len(STEPS), read_only=read_only) as manager:
                found = manager.restore(*trees)
        check(found, *trees)
    except jpeft.CheckpointError as e:
        return f"FAULT: refused, with whole steps there: {e}"
    except Exception as e:
        return f"FAULT: {type(e).__name__}: {e}"
    if found.step == max(STEPS):
        return "the latest step, exactly" if not found.skipped else f"FAULT: {found.skipped}"
    named = f"Step {step}" in " ".join(found.skipped) and any(f"Step {step}" in str(w.message) for w in told)
    aside = read_only or not os.path.exists(directory / str(step))
    return "an earlier step, exactly, and said so" if named and aside else f"FAULT: step {found.step}, not said"


if __name__ == "__main__":
    tyro.cli(main)
