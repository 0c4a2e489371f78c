"""`jpeft finetune`: a pretrained model, data and a method become an adapter."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
from rich.console import Console

import jpeft
from jpeft.cli import _report
from jpeft.cli._arguments import Arguments, option
from jpeft.cli._causal import Causal
from jpeft.cli._classification import Classification
from jpeft.cli._errors import UserError, one_line
from jpeft.cli._methods import resolve, transform
from jpeft.cli._run import BEST, Row, Run, new_directory
from jpeft.cli._task import Task
from jpeft.cli._train import State, make_evaluation, make_step, optimizer, train
from jpeft.hf._load import describe
from jpeft.hf.architectures import decoders


KINDS = (Causal, Classification)


def finetune(arguments: Arguments, console: Console) -> None:
    """Train, evaluate and write the run directory, from where its last save left it if the run is resumed.

    Raises a UserError for what the user can put right, before anything is written, and `Interrupted` after a Ctrl-C.
    """
    arguments.check()
    kind = _kind(arguments)
    arguments = resolve(arguments, kind)
    directory = arguments.output if arguments.resume else new_directory(arguments)
    task = kind(arguments)
    arguments = _with_steps(arguments, task)

    prepare = partial(transform(arguments, task), key=jax.random.key(arguments.seed))
    tx = optimizer(arguments)
    with one_line():
        planned = jax.eval_shape(prepare, task.params)
    console.print(task.describe())
    _report.show_plan(console, jpeft.summary(planned, tx))

    run = Run(directory)
    if arguments.resume:
        run.check_data(task.fingerprint())
    else:
        run.start(arguments, task.fingerprint())
    initial = lambda params: State(trainable := jpeft.partition(params)[0], tx.init(trainable))
    like = jax.eval_shape(initial, planned)
    start, state = run.load(like)
    params = task.params
    if state is None:
        with console.status("what training starts from"):
            params, row = task.start(arguments)
        if row:
            run.log(step=0, **row)
    params = prepare(params)
    frozen = jpeft.partition(params)[1]
    with _report.progress_bar(console, task.unit) as bar:
        state = train(
            run, start, initial(params) if state is None else state, frozen=frozen, task=task, arguments=arguments,
            step_fn=make_step(task, tx), evaluate=make_evaluation(task, arguments.batch_size),
            report=_report.reporter(bar, start, arguments.steps, task.metric, task.formatted),
        )  # fmt: skip

    trainable, row = state.trainable, run.evaluations()[-1]
    if arguments.patience:
        trainable, row = run.read(BEST, like.trainable)[1], run.best()
        if row is None:
            raise UserError("no evaluation had a finite loss: there is no best adapter to keep")
    _finish(run, task, arguments, console, jpeft.combine(trainable, frozen), row)


def _kind(arguments: Arguments) -> type[Task]:
    """What the model is for. Raises a UserError for options that are of other kinds."""
    kind: type[Task] = Classification
    if arguments.model is not None:
        with one_line():
            fields, _ = describe(arguments.model)
        kind = Causal if fields["model_type"] in decoders.ARCHITECTURES else Classification
    foreign = [name for other in KINDS if other is not kind for name in other.options]
    defaults = {field.name: field.default for field in dataclasses.fields(Arguments)}
    if given := [option(name) for name in foreign if getattr(arguments, name) != defaults[name]]:
        raise UserError(f"{', '.join(given)}: not for {kind.kind} models, which {arguments.model or 'the default'} is")
    return kind


def _with_steps(arguments: Arguments, task: Task) -> Arguments:
    epoch = task.train.steps(arguments.batch_size * arguments.accumulate)
    steps = arguments.steps or math.ceil(arguments.epochs * epoch)
    return dataclasses.replace(arguments, steps=steps, eval_every=arguments.eval_every or epoch)


def _finish(run: Run, task: Task, arguments: Arguments, console: Console, params: Any, row: Row) -> None:
    """Write the adapter, the last row of metrics, and what a reader looks at; `row` is of the adapter's evaluation."""
    start = f"start_{task.metric}"
    first = run.rows[0] | {start: run.evaluations()[0][task.metric]}
    result = {name: first[name] for name in (*task.compared, start)} | {
        task.metric: row[task.metric],
        "adapter_bytes": jpeft.save(run.directory / "adapter", params, overwrite=True),
        "model_bytes": sum(path.stat().st_size for path in task.source.glob("*.safetensors")),
    }
    with one_line():
        task.export(run.directory, params, arguments)
    before = dict(task.compared) | {start: "before training"}
    _report.draw_curves(run.directory / "curves.png", run.rows, result, task.metric, task.compared)
    run.log(step=run.rows[-1]["step"], **result)
    trained = {task.metric: f"fine-tuned with {arguments.method}, {arguments.base} base"}
    _report.show_results(console, result, before | trained, task.formatted)
    console.print(f"run directory: {run.directory}")
