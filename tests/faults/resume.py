"""A run that is killed and goes on is, bit by bit, the run that was never killed.

    python tests/faults/resume.py --steps 200 --kills 5

For every optimizer, a method of every family, and what happens between steps, each in processes of its own: one makes
all steps; others are killed with SIGKILL, at random steps and while saves are being written, and go on from what
`jpeft.CheckpointManager` has. In the end the adapter and the optimizer's state must have the same bits. So that this is
seen to tell something, there is one run more that goes on with the data from the start again: it must differ.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from small_runs import FAMILIES, OPTIMIZERS, QUANTIZED, SETUPS, TRANSITIONS, Rows, State, Training, digest

import jpeft


DEFAULT = (*OPTIMIZERS, *TRANSITIONS, *QUANTIZED, *FAMILIES)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--kills", type=int, default=1, help="of a run: one in its middle, several at random steps")
    parser.add_argument("--every", type=int, default=10, help="steps between saves")
    parser.add_argument("--only", nargs="+", choices=SETUPS, default=DEFAULT, metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)  # what a process of its own is to do
    options = parser.parse_args(argv)
    if options.run:
        print(json.dumps(run(**options.run)))
        return 0
    if options.steps < 4 * options.every:
        parser.error("a run is killed after two saves, of which the first is sure to be written: more --steps")
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.only:
            began = time.perf_counter()
            told = check(name, options, Path(scratch), control=name == options.only[0])
            failed += told.startswith("FAILED")
            print(f"{name}: {told}; {time.perf_counter() - began:.0f} s", flush=True)
    print(f"runs: {len(options.only)}, and a negative control, faults: {failed}")
    return min(failed, 1)


def check(name: str, options: argparse.Namespace, scratch: Path, *, control: bool) -> str:
    """What became of one setup, straight and killed; with `control` of the run that forgets its data, too."""
    rng, steps = random.Random(f"{options.seed}:{name}"), options.steps
    kills = [steps // 2] if options.kills == 1 else sorted(rng.sample(range(2 * options.every, steps), options.kills))
    directory = scratch / name.replace(":", "-")
    how = {"name": name, "steps": steps, "every": options.every}
    process = lambda where, **more: _process(how | {"directory": str(directory / where)} | more, scratch / "compiled")
    whole = process("whole")
    for kill in kills:
        process("killed", kill=kill)
    if control:
        shutil.copytree(directory / "killed", directory / "forgetful")
        forgetful = process("forgetful", forgetful=True)
        if _same(forgetful, whole):
            return "FAILED: the negative control, which forgets its data, cannot be told from the whole run"
    resumed = process("killed")
    where = f"killed after {', '.join(map(str, kills))}, on from {resumed['from']}"
    if not _same(resumed, whole) or not 0 < resumed["from"] <= kills[-1]:
        return f"FAILED: {where}, another run: {resumed}, not {whole}"
    return f"{where}, the same bits: {whole['adapter'][:12]}, {whole['optimizer'][:12]}"


def _same(one: dict, other: dict) -> bool:
    return all(one[part] == other[part] for part in ("adapter", "optimizer"))


def _process(how: dict, compiled: Path) -> dict | None:
    """What `run` returns, in a process of its own; `None` of one that is to be killed."""
    caching = {"JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, __file__, "--run", json.dumps(how)]
    done = subprocess.run(command, env=os.environ | caching, stdout=subprocess.PIPE, text=True)
    expected = -signal.SIGKILL if "kill" in how else 0
    if done.returncode != expected:
        raise SystemExit(f"{how}: exit code {done.returncode}, not {expected}")
    return None if "kill" in how else json.loads(done.stdout)


def run(
    *, name: str, steps: int, every: int, directory: str, kill: int | None = None, forgetful: bool = False
) -> dict:
    """Train up to `steps`, from the last step saved in `directory`, and die after step `kill`; tell what came of it."""
    training, rows = Training(SETUPS[name]), Rows()
    first = training.start()
    transitions, done, state = SETUPS[name].next is not None, 0, first
    with jpeft.CheckpointManager(directory, keep=2) as manager:
        if (found := manager.restore(first.params, _kept(first, transitions))) is not None:
            done, state = found.step, _restored(found, transitions)
            rows.position = 0 if forgetful else found.data["position"]
        start = done
        while done < steps:
            state = training.step(state, next(rows), done)
            done += 1
            if done % every == 0:
                tuned = jpeft.combine(jpeft.partition(state.params)[0], first.params)
                manager.save(done, tuned, _kept(state, transitions), data={"position": rows.position})
            if done == kill:
                os.kill(os.getpid(), signal.SIGKILL)
    hashes = {"adapter": digest(state.params), "optimizer": digest((state.opt_state, state.more))}
    return {"from": start} | hashes


def _kept(state: State, transitions: bool):
    """What is saved beside what trains. Transitions change frozen arrays too, of which a manager keeps checksums."""
    return (state.opt_state, state.more, jpeft.partition(state.params)[1]) if transitions else state.opt_state


def _restored(found: jpeft.Restored, transitions: bool) -> State:
    if not transitions:
        return State(found.params, found.opt_state)
    opt_state, more, frozen = found.opt_state
    return State(jpeft.combine(jpeft.partition(found.params)[0], frozen), opt_state, more)


if __name__ == "__main__":
    sys.exit(main())
