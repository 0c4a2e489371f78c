"""Let the disk run full during a save: it raises, earlier steps stay, and with room again the next one is saved.

    python tests/faults/full_disk.py --count 20 --seed 0

The disk is a small one in memory (tmpfs), which only root may mount.
"""

import os
import random
import subprocess
import tempfile
from pathlib import Path

import tyro
from rich.progress import track
from tiny_run import check, save, trees

import jpeft


SIZE = 900  # KiB: several steps


def main(count: int = 20, seed: int = 0) -> None:
    """Save at `count` levels of free space, from none to more than a step needs, in turn at once and asynchronously."""
    at, outcomes = random.Random(seed), {"raised": 0, "saved": 0}
    params, opt_state = trees()
    with tempfile.TemporaryDirectory() as disk:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}k", "tmpfs", disk], check=True)
        try:
            for level in track(range(count), "levels", auto_refresh=False):
                directory, filler = Path(disk) / "run", Path(disk) / "filler"
                with jpeft.CheckpointManager(directory, keep=2, asynchronous=level % 2 == 1) as manager:
                    last = max(manager.steps, default=0)
                    save(manager, last + 1, params, opt_state)
                    manager.wait()
                    fill(filler, free=at.randint(0, 200))
                    try:
                        save(manager, last + 2, params, opt_state)
                        manager.wait()
                        done = last + 2
                        outcomes["saved"] += 1
                    except jpeft.CheckpointError as e:
                        assert "No space left" in str(e) or "ENOSPC" in str(e) or "RESOURCE_EXHAUSTED" in str(e), e
                        done = last + 1
                        outcomes["raised"] += 1
                    found = manager.restore(params, opt_state)
                    assert found.step == done and not found.skipped, (found.step, done, found.skipped)
                    check(found, params, opt_state)
                    filler.unlink()
                    save(manager, last + 3, params, opt_state)
                with jpeft.CheckpointManager(directory, read_only=True) as manager:
                    for step in manager.steps:
                        check(manager.restore(params, opt_state, step=step), params, opt_state)
                    assert manager.steps[-1] == last + 3, manager.steps
                    left = set(os.listdir(directory)) - {".writer", *map(str, manager.steps)}
                    assert not left, left
        finally:
            subprocess.run(["umount", disk], check=True)
    print(f"levels: {count}, {outcomes}, faults: 0")


def fill(file: Path, free: int) -> None:
    """Write a file that leaves so many KiB."""
    disk = os.statvfs(file.parent)
    room = disk.f_bavail * disk.f_frsize - free * 1024
    file.write_bytes(bytes(max(room, 0)))


if __name__ == "__main__":
    tyro.cli(main)
