"""How much fine-tuning beats a linear probe on frozen features, over seeds.

    python experiments/finetune_seeds.py --task keywords --seeds 0 1 2

Runs `jpeft finetune` with its defaults for every seed, in `--output`, and prints a row of accuracies for each.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from jpeft.cli import main


def run(task: str, seed: int, output: Path) -> dict[str, float]:
    """The last row of metrics of a run; a run that is there already is not made again."""
    directory = output / f"{task}-{seed}"
    if not (directory / "curves.png").exists():
        resume = ["--resume"] if (directory / "config.json").exists() else ["--task", task, "--seed", str(seed)]
        if code := main(["finetune", "--output", str(directory), *resume]):
            sys.exit(code)
    return json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="keywords", help="keywords or docstrings")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    rows = [run(arguments.task, seed, arguments.output) for seed in arguments.seeds]
    print("| seed | majority | linear probe | fine-tuned | gain, points |\n|---|---|---|---|---|")
    for seed, row in zip(arguments.seeds, rows, strict=True):
        accuracies = [100 * row[f"{name}accuracy"] for name in ("majority_", "probe_", "")]
        print(f"| {seed} | {' | '.join(f'{x:.1f}' for x in accuracies)} | {accuracies[2] - accuracies[1]:+.1f} |")
    gains = [100 * (row["accuracy"] - row["probe_accuracy"]) for row in rows]
    print(f"mean gain {statistics.mean(gains):+.1f} points")
