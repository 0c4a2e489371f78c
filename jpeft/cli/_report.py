"""What the command shows."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table

from jpeft._summary import Row as ParameterRow
from jpeft._summary import Summary, human
from jpeft.cli._run import Row


def show_plan(console: Console, summary: Summary) -> None:
    """A table of what trains and what is quantized, like layers as one row, and the memory that all takes."""
    rows = summary.grouped()
    plain = [row for row in rows if row.kind == "array"]
    table = Table("parameter", "kept as", "shape", title="What will be trained", box=SIMPLE_HEAD)
    table.add_column("trainable", justify="right", style="green")
    table.add_column("memory", justify="right")
    for row in (row for row in rows if row.kind != "array"):
        name = f"{row.path} x{row.count}" if row.count > 1 else row.path
        shape = "" if row.shape is None else "x".join(map(str, row.shape))
        table.add_row(name, row.kind, shape, f"{row.trainable:,}" if row.trainable else "-", human(_bytes(row)))
    if plain:
        name = f"the other {sum(row.count for row in plain)} parameters"
        table.add_row(name, "array", "", "-", human(sum(map(_bytes, plain))), style="dim")
    console.print(table)
    console.print(f"{summary.trainable:,} of {summary.total:,} parameters train: {summary.percent:.3g}%")
    memory = f"weights {human(summary.weight_bytes)}, gradients {human(summary.gradient_bytes)}"
    console.print(f"memory: {memory}, optimizer {human(summary.optimizer_bytes)}\n")


def _bytes(row: ParameterRow) -> int:
    return row.trainable_bytes + row.frozen_bytes


class _Rate(ProgressColumn):
    def __init__(self, batch_size: int):
        super().__init__()
        self._batch_size = batch_size

    def render(self, task: Task) -> str:
        return f"{self._batch_size * (task.speed or 0):.0f} examples/s"


def progress_bar(console: Console, batch_size: int) -> Progress:
    """A bar of steps with loss, examples a second and the time left; its tasks need a field `loss`."""
    loss = TextColumn("loss {task.fields[loss]:.3f}")
    left = (TimeRemainingColumn(), TextColumn("left"))
    return Progress(BarColumn(), MofNCompleteColumn(), loss, _Rate(batch_size), *left, console=console)


def reporter(bar: Progress, start: int, steps: int) -> Callable[[Row], None]:
    """What moves the bar on with a step's row of metrics, and prints an evaluation's."""
    task = bar.add_task("", total=steps, completed=start, loss=math.nan)

    def report(row: Row) -> None:
        if "loss" in row:
            bar.update(task, completed=row["step"], loss=row["loss"])
        else:
            bar.console.print(f"step {row['step']}: accuracy {row['accuracy']:.1%}, loss {row['evaluation_loss']:.3f}")

    return report


def show_results(console: Console, result: Row, method: str) -> None:
    """The accuracies, and the adapter's size."""
    table = Table("classifier", title="Accuracy on the evaluation texts", box=SIMPLE_HEAD)
    table.add_column("accuracy", justify="right")
    table.add_row("majority class", f"{result['majority_accuracy']:.1%}")
    table.add_row("linear probe on the frozen features", f"{result['probe_accuracy']:.1%}")
    table.add_row(f"fine-tuned with {method}", f"{result['accuracy']:.1%}", style="bold green")
    console.print(table)
    adapter, model = result["adapter_bytes"], result["model_bytes"]
    console.print(f"adapter {human(adapter)}: {adapter / model:.2%} of the model's {human(model)}")


def draw_curves(path: Path, rows: Sequence[Row], result: Row) -> None:
    """A picture of the losses and of the accuracy, with the probe's and the majority's beside it."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, name, label in (
        (left, "loss", "training"), (left, "evaluation_loss", "evaluation"), (right, "accuracy", "fine-tuned"),
    ):  # fmt: skip
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), label=label, marker="" if name == "loss" else "o")
    right.axhline(result["probe_accuracy"], color="gray", linestyle="--", label="linear probe")
    right.axhline(result["majority_accuracy"], color="gray", linestyle=":", label="majority class")
    for axes, label in ((left, "cross entropy"), (right, "accuracy")):
        axes.set(xlabel="step", ylabel=label)
        axes.legend()
    figure.savefig(path, dpi=120)
