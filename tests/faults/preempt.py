"""SIGTERM to one of several processes at a random moment: all save the same step and exit, and the run goes on.

    python tests/faults/preempt.py --count 100 --seed 0

In every trial all processes must have ended with the exit code `jpeft.distributed.PREEMPTED` within `LIMIT` seconds
after the signal; and the run, started again, must go on after the step that they saved, to the losses of a run that
was not interrupted. Trials with one and with two processes take turns.
"""

import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import tyro

from jpeft.distributed import PREEMPTED


sys.path.append(str(Path(__file__).parents[1] / "processes"))
from launcher import Processes, run
from training import FAULTY, TRAIN, inputs, losses, saved, straight


LIMIT = 10.0  # seconds
STEPS, PACE = 100, 0.05  # updates, and the seconds that each takes at least until the signal


def trial(directory: Path, name: str, processes: int, moments: random.Random) -> tuple[float, list[str]]:
    """The seconds from the signal to the last end, and everything that was wrong."""
    output = directory / name
    training = [*inputs(directory), "--steps", STEPS, "--save-every", STEPS, "--output", output]
    with Processes(FAULTY, "--pace", PACE, *training, count=processes, directory=directory) as group:
        group.until(f"step {moments.randint(1, 20)}  ")
        time.sleep(moments.uniform(0, PACE))
        group.send(moments.randrange(processes), signal.SIGTERM)
        sent = time.monotonic()
        ends = group.wait()
    seconds = max(end.time for end in ends) - sent
    faults = [f"they took {seconds:.1f} s"] if seconds > LIMIT else []
    faults += [f"process {i}: {end.code}\n{end.output}" for i, end in enumerate(ends) if end.code != PREEMPTED]
    steps = saved(output)
    if len(steps) != 1 or max(losses(output)) != steps[0]:
        faults.append(f"the steps {steps} were saved; the last row is that of step {max(losses(output))}")
    ends = run(TRAIN, *training, count=processes, directory=directory)
    if f"Going on after step {max(steps, default=0)}\n" not in ends[0].output:
        faults.append(ends[0].output)
    if losses(output) != losses(straight(directory, STEPS, STEPS, processes)):
        faults.append(f"other losses: {losses(output)}")
    return seconds, faults


def main(count: int = 100, seed: int = 0) -> None:
    moments, failed, slowest = random.Random(seed), 0, 0.0
    with tempfile.TemporaryDirectory() as scratch:
        for n in range(count):
            seconds, faults = trial(Path(scratch), f"run-{n}", 1 + n % 2, moments)
            slowest, failed = max(slowest, seconds), failed + bool(faults)
            print(f"{n}: {1 + n % 2} processes: {seconds:.1f} s", *faults, sep="\n", flush=True)
    print(f"signals: {count}, wrong: {failed}, slowest to end: {slowest:.1f} s")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    tyro.cli(main)
