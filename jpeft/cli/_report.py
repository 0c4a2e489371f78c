"""What the command shows."""

import math
from collections.abc import Callable, Mapping, Sequence
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
    """The speed in steps, times what a step is in the mean."""

    def __init__(self, unit: str):
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> str:
        return f"{task.fields['amount'] * (task.speed or 0):,.0f} {self._unit}/s"


def progress_bar(console: Console, unit: str) -> Progress:
    """A bar of steps with loss, the work done a second and the time left; its tasks need fields `loss`, `amount`."""
    loss = TextColumn("loss {task.fields[loss]:.3f}")
    left = (TimeRemainingColumn(), TextColumn("left"))
    return Progress(BarColumn(), MofNCompleteColumn(), loss, _Rate(unit), *left, console=console)


def reporter(bar: Progress, start: int, steps: int, metric: str, formatted: str) -> Callable[[Row, int], None]:
    """What moves the bar on with a step's row of metrics and the amount of its work, and prints an evaluation's."""
    task = bar.add_task("", total=steps, completed=start, loss=math.nan, amount=0.0)
    amounts: list[int] = []

    def report(row: Row, amount: int) -> None:
        if "loss" in row:
            amounts.append(amount)
            loss = math.nan if row["loss"] is None else row["loss"]
            bar.update(task, completed=row["step"], loss=loss, amount=sum(amounts) / len(amounts))
            if "skipped" in row:
                told = f"loss or gradient not finite, {row['skipped']} in a row"
                bar.console.print(f"step {row['step']} skipped: {told}")
        else:
            value, loss = _number(row[metric], formatted), _number(row["evaluation_loss"], ".3f")
            bar.console.print(f"step {row['step']}: {metric} {value}, loss {loss}")

    return report


def _number(x: float | None, formatted: str) -> str:
    return "not finite" if x is None else format(x, formatted)


def show_results(console: Console, result: Row, names: Mapping[str, str], formatted: str) -> None:
    """A metric of the models to be compared, the last of which is the trained one, and the adapter's size."""
    *before, (trained, name) = names.items()
    table = Table("model", title="On the evaluation rows", box=SIMPLE_HEAD)
    table.add_column(trained, justify="right")
    for key, other in before:
        table.add_row(other, _number(result[key], formatted))
    table.add_row(name, _number(result[trained], formatted), style="bold green")
    console.print(table)
    adapter, model = result["adapter_bytes"], result["model_bytes"]
    console.print(f"adapter {human(adapter)}: {adapter / model:.2%} of the model's {human(model)}")


def draw_curves(path: Path, rows: Sequence[Row], result: Row, metric: str, compared: Mapping[str, str]) -> None:
    """A picture of the losses and of the metric, with those that it is compared with beside it."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, name, label in (
        (left, "loss", "training"), (left, "evaluation_loss", "evaluation"), (right, metric, "fine-tuned"),
    ):  # fmt: skip
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        axes.plot(*zip(*points, strict=True), label=label, marker="" if name == "loss" else "o")
    for (name, label), style in zip(compared.items(), ("--", ":", "-."), strict=False):
        right.axhline(result[name], color="gray", linestyle=style, label=label)
    for axes, label in ((left, "cross entropy"), (right, metric)):
        axes.set(xlabel="step", ylabel=label)
        axes.legend()
    figure.savefig(path, dpi=120)
