"""Start two writers on one directory at one moment: one of them gets it, the other is told, and nothing is lost.

    python tests/faults/writers.py --count 20 --seed 0
"""

import os
import random
import signal
import tempfile
import time
from pathlib import Path

import tyro
from rich.progress import track
from tiny_run import note, noted, save, start, trees

import jpeft


def writer(number: int, directory: Path, log: Path, moment: float) -> None:
    """Take the directory at a moment, save a step, and hold it until killed; or be refused."""
    params, opt_state = trees()
    jpeft.CheckpointManager(directory.with_name(f"warm-{number}")).close()
    time.sleep(max(moment - time.time(), 0))
    try:
        manager = jpeft.CheckpointManager(directory)
    except jpeft.CheckpointError as e:
        assert "is being written by another" in str(e)
        note(log, f"refused {number}")
        return
    latest = max(manager.steps, default=0)
    for step in (latest, max(latest - 1, 0)) if latest else ():
        try:
            save(manager, step, params, opt_state)
            note(log, f"unsaid {step}")
        except jpeft.SaveSkippedError:
            note(log, f"skipped {step}")
    save(manager, latest + 1, params, opt_state)
    manager.wait()
    if not os.fork():  # a child that outlives it, such as one that loads data, does not keep the directory
        time.sleep(10)
        os._exit(0)
    note(log, f"saved {latest + 1}")
    signal.pause()


def main(count: int = 20, seed: int = 0, lead: float = 1.0) -> None:
    """Race `count` times. The winner is killed, so that the next two find the lock of a dead process.

    Each has `lead` seconds to get ready, and then begins within some milliseconds of the other.
    """
    at, faults, skipped = random.Random(seed), [], 0
    with tempfile.TemporaryDirectory() as scratch:
        directory, log = Path(scratch) / "run", Path(scratch) / "log"
        for race in track(range(1, count + 1), "races", auto_refresh=False):
            log.unlink(missing_ok=True)
            moment = time.time() + lead
            moments = [moment + at.uniform(0, 0.01) for _ in range(2)]
            both = [start(lambda n=n, m=m: writer(n, directory, log, m)) for n, m in enumerate(moments)]
            deadline = time.time() + 120
            while time.time() < deadline and not (noted(log, "refused") and noted(log, "saved")):
                time.sleep(0.02)
            if len(noted(log, "refused")) != 1 or noted(log, "saved") != [race] or noted(log, "unsaid"):
                faults.append(log.read_text() if log.exists() else "nothing happened")
            skipped += len(noted(log, "skipped"))
            for process in both:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
    print(f"races: {count}, saves that were skipped and said so: {skipped}, faults: {len(faults)}", *faults)
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    tyro.cli(main)
