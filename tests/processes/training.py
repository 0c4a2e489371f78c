"""Runs of experiments/train_pjit.py on a Llama of a few thousand random parameters."""

import json
import sys
from pathlib import Path

import numpy as np
from launcher import ROOT, run


sys.path.append(str(ROOT / "tests" / "cli"))
TRAIN, FAULTY = ROOT / "experiments" / "train_pjit.py", ROOT / "tests" / "processes" / "faulty.py"


def inputs(directory: Path) -> list:
    """Write a checkpoint and tokens into `directory`, once; the arguments that name them."""
    from causal import save_llama

    model, data = directory / "llama", directory / "tokens.npy"
    if not data.exists():
        directory.mkdir(parents=True, exist_ok=True)
        save_llama(model)
        np.save(data, np.random.default_rng(0).integers(5, 250, 2000).astype(np.uint16))
    return ["--model", model, "--data", data, "--batch", 8, "--length", 16, "--log-every", 1]


def losses(output: Path) -> dict[int, float]:
    """The loss of every update that was logged."""
    rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows}


def saved(output: Path) -> list[int]:
    """The steps that are there as a whole."""
    return sorted(int(path.name) for path in (output / "checkpoints").glob("*") if path.name.isdigit())


def straight(directory: Path, steps: int, save_every: int, processes: int) -> Path:
    """The output of a run in which nothing happens; made once."""
    output = directory / f"straight-{steps}-{processes}"
    if not output.exists():
        training = [*inputs(directory), "--steps", steps, "--save-every", save_every, "--output", output]
        run(TRAIN, *training, count=processes, directory=directory)
    return output
