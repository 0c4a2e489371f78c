"""experiments/train_pjit.py, one process of which is killed or raises: `--fault kill --where save --at 6 --victim 1`.

Or one with updates that take their time, `--pace 0.1`. All other arguments are those of the training.
"""

import argparse
import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

import jpeft


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--fault", choices=["kill", "raise"])
    parser.add_argument("--where", choices=["step", "save"])
    parser.add_argument("--at", type=int, help="step")
    parser.add_argument("--victim", type=int, help="number of the process")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds until it is killed")
    parser.add_argument("--pace", type=float, default=0.0, help="seconds that every update takes longer")
    parser.add_argument("--process", type=int)
    given, rest = parser.parse_known_args()

    def inject() -> None:
        print("the fault", flush=True)
        if given.fault == "raise":
            raise RuntimeError("something is wrong")
        threading.Timer(given.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    preempted, save = jpeft.distributed.preempted, jpeft.CheckpointManager.save

    def faulty_preempted(step):
        time.sleep(given.pace)
        if step == given.at and (given.where, given.process) == ("step", given.victim):
            inject()
        return preempted(step)

    def faulty_save(manager, step, *args, **kwargs):
        if step == given.at and (given.where, given.process) == ("save", given.victim):
            inject()
        return save(manager, step, *args, **kwargs)

    jpeft.distributed.preempted, jpeft.CheckpointManager.save = faulty_preempted, faulty_save
    train = Path(__file__).parents[2] / "experiments" / "train_pjit.py"
    sys.argv = [str(train), *rest, "--process", str(given.process)]
    runpy.run_path(str(train), run_name="__main__")


if __name__ == "__main__":
    main()
