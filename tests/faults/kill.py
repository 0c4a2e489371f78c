"""Kill a process with -9 while it saves, again and again: no step that was saved may be lost, or wrong.

    python tests/faults/kill.py --count 500 --seed 0
"""

import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Literal

import tyro
from rich.progress import track
from tiny_run import check, note, noted, save, start, trees

import jpeft


def worker(directory: Path, log: Path, asynchronous: bool, before: list[int]) -> None:
    """Restore everything that a killed process has left, then save until killed, too."""
    params, opt_state = trees()
    with jpeft.CheckpointManager(directory, keep=2, asynchronous=asynchronous) as manager:
        steps = manager.steps
        assert max(steps, default=0) >= max(before, default=0), f"{before[-1]} was saved, and there are {steps}"
        for step in steps:
            with jpeft.CheckpointManager(directory, read_only=True) as reader:
                check(reader.restore(params, opt_state, step=step), params, opt_state)
        found = manager.restore(params, opt_state)
        assert (found.step if found else None) == max(steps, default=None) and not (found and found.skipped)
        note(log, f"checked {len(steps)}")
        step = max(steps, default=0)
        while True:
            step += 1
            note(log, f"saving {step}")
            save(manager, step, params, opt_state)
            note(log, f"saved {step if not asynchronous else step - 1}")


Mode = Literal["sync", "async", "both"]


def main(count: int = 500, seed: int = 0, longest: float = 0.5, mode: Mode = "both") -> None:
    """Kill `count` processes, each at a moment of the `longest` seconds after one of its first saves begins.

    Synchronous and asynchronous saves take turns of 20, in a directory of their own.
    """
    moments, faults, checked = random.Random(seed), 0, 0
    for turn in track(range(0, count, 20), "kills, in turns of 20", auto_refresh=False):
        asynchronous = mode == "async" or (mode == "both" and turn // 20 % 2 == 1)
        with tempfile.TemporaryDirectory() as scratch:
            directory, log, saved = Path(scratch) / "run", Path(scratch) / "log", []
            kills = min(20, count - turn)
            for kill in range(kills + 1):  # the last one checks
                log.unlink(missing_ok=True)
                process = start(lambda a=(directory, log, asynchronous, saved): worker(*a))
                word, times = ("saving", moments.randint(1, 4)) if kill < kills else ("checked", 1)
                ended = 0
                while len(noted(log, word)) < times and not ended:
                    time.sleep(0.01)
                    ended = os.waitpid(process, os.WNOHANG)[0]
                if ended:
                    faults += 1
                    break
                time.sleep(moments.uniform(0, longest) if kill < kills else 0)
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                checked += sum(noted(log, "checked"))
                saved += [step for step in noted(log, "saved") if step > 0]
    print(f"kills: {count}, steps restored: {checked}, faults: {faults}")
    raise SystemExit(faults > 0)


if __name__ == "__main__":
    tyro.cli(main)
