"""One of several processes is killed or raises, in a step or in a save: all end, and no step that was saved is lost.

    python tests/faults/peers.py --count 20 --processes 2 --seed 0

In every trial all processes must have ended with an exit code other than 0 and a reason within `LIMIT` seconds after
the first; and the run, started again, must go on after the last step that was there, to the losses of a run in which
nothing happened.
"""

import random
import sys
import tempfile
from pathlib import Path

import tyro


sys.path.append(str(Path(__file__).parents[1] / "processes"))
from launcher import Processes, run
from training import FAULTY, TRAIN, inputs, losses, saved, straight


LIMIT = 30.0  # seconds
STEPS, EVERY = 24, 4
# It told; its connection broke; JAX gave it up, or process 0, where the service is.
REASONS = "process {} failed:", "by peer", "heartbeat", "coordination service"


def trial(directory: Path, name: str, fault: dict, processes: int) -> tuple[float, list[str]]:
    """The seconds from the first end to the last, and everything that was wrong."""
    output = directory / name
    training = [*inputs(directory), "--steps", STEPS, "--save-every", EVERY, "--output", output]
    flags = [word for flag, value in fault.items() for word in (f"--{flag}", value)]
    with Processes(FAULTY, *flags, *training, count=processes, directory=directory) as group:
        ends = group.wait()
    seconds = max(end.time for end in ends) - min(end.time for end in ends)
    faults = [f"all took {seconds:.1f} s to end"] if seconds > LIMIT else []
    for i, end in enumerate(ends):
        told = any(reason.format(fault["victim"]) in end.output for reason in REASONS)
        if end.code == 0 or not (told or i == fault["victim"]):
            faults.append(f"process {i} ended with {end.code}:\n{end.output}")
    left = saved(output)
    ends = run(TRAIN, *training, count=processes, directory=directory)
    begun = [line for line in ends[0].output.splitlines() if line.startswith("Going on")]
    if begun != [f"Going on after step {step}" for step in left[-1:]]:  # from the start, where nothing was saved
        faults.append(f"the steps {left} were there:\n{ends[0].output}")
    if losses(output) != losses(straight(directory, STEPS, EVERY, processes)):
        faults.append(f"other losses: {losses(output)}")
    return seconds, faults


def main(count: int = 20, processes: int = 2, seed: int = 0) -> None:
    moments, failed, slowest = random.Random(seed), 0, 0.0
    with tempfile.TemporaryDirectory() as scratch:
        for n in range(count):
            fault = {
                "fault": ("kill", "raise")[n % 2],
                "where": ("step", "save")[n // 2 % 2],
                "at": EVERY * moments.randint(1, STEPS // EVERY - 1),
                "victim": moments.randrange(processes),
                "delay": moments.uniform(0, 0.2),
            }
            seconds, faults = trial(Path(scratch), f"run-{n}", fault, processes)
            slowest, failed = max(slowest, seconds), failed + bool(faults)
            print(f"{n}: {fault}: {seconds:.1f} s", *faults, sep="\n", flush=True)
    print(f"faults injected: {count}, wrong: {failed}, slowest to end: {slowest:.1f} s")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    tyro.cli(main)
