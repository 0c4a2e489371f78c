"""`jpeft finetune`: a pretrained encoder, labelled texts and a method become an adapter."""

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Iterator
from functools import partial
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import jpeft
from jpeft import models
from jpeft.cli import _report
from jpeft.cli._arguments import Arguments
from jpeft.cli._data import Example, Texts, held_out, label_names, read_jsonl
from jpeft.cli._docstrings import docstrings
from jpeft.cli._errors import UserError, check_choice
from jpeft.cli._keywords import keywords
from jpeft.cli._methods import resolve, transform
from jpeft.cli._probe import probe
from jpeft.cli._run import Row, Run, new_directory
from jpeft.cli._train import State, features, make_evaluation, make_step, optimizer, train


if TYPE_CHECKING:
    from tokenizers import Tokenizer


TASKS = {"keywords": keywords, "docstrings": docstrings}


class Task(NamedTuple):
    """Labelled texts."""

    train: list[Example]
    evaluation: list[Example]
    labels: list[str]

    def fingerprint(self) -> Row:
        """What tells these texts from others."""
        sizes = {"texts": len(self.train), "evaluation_texts": len(self.evaluation)}
        digest = hashlib.sha256(repr((self.train, self.evaluation)).encode()).hexdigest()
        return {"labels": self.labels, **sizes, "sha256": digest}


def read_task(arguments: Arguments) -> Task:
    """The user's texts, or a task of the standard library's. Raises a UserError for texts that are no task."""
    check_choice("task", arguments.task, TASKS)
    train = TASKS[arguments.task]() if arguments.data is None else read_jsonl(arguments.data)
    if arguments.eval_data is None:
        held = held_out(train, fraction=0.2, salt="evaluation")
        train, evaluation = list(compress(train, ~held)), list(compress(train, held))
    else:
        evaluation = read_jsonl(arguments.eval_data)
    return Task(train, evaluation, label_names(train, evaluation))


def finetune(arguments: Arguments, console: Console) -> None:
    """Train, evaluate and write the run directory, from where its last save left it if the run is resumed.

    Raises a UserError for what the user can put right, before anything is written, and `Interrupted` after a Ctrl-C.
    """
    arguments.check()
    arguments = resolve(arguments)
    directory = arguments.output if arguments.resume else new_directory(arguments)
    task = read_task(arguments)
    source, config, encoder, tokenizer = _load(arguments)
    tokenized = partial(Texts, labels=task.labels, tokenizer=tokenizer, max_length=arguments.max_length)
    texts, evaluation = tokenized(task.train), tokenized(task.evaluation)
    arguments = _with_steps(arguments, len(texts))

    model = models.Classifier(config, len(task.labels))
    shape = (config.hidden_size, len(task.labels))
    params = {"encoder": encoder, "head": {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[1])}}
    prepare = partial(transform(arguments), key=jax.random.key(arguments.seed))
    tx = optimizer(arguments)
    with _one_line():
        planned = jax.eval_shape(prepare, params)
    console.print(f"{len(texts):,} texts to train on, {len(evaluation):,} to evaluate on, {len(task.labels)} labels")
    _report.show_plan(console, jpeft.summary(planned, tx))

    run = Run(directory)
    if arguments.resume:
        run.check_data(task.fingerprint())
    else:
        run.start(arguments, task.fingerprint())
    initial = lambda params: State(trainable := jpeft.partition(params)[0], tx.init(trainable))
    start, state = run.load(like=jax.eval_shape(initial, planned))
    if state is None:
        with console.status("linear probe on the frozen features"):
            params["head"], accuracies = _probe(models.Encoder(config), encoder, task, texts, evaluation, arguments)
        run.log(step=0, **accuracies)
    params = prepare(params)
    frozen = jpeft.partition(params)[1]
    with _report.progress_bar(console, arguments.batch_size) as bar:
        state = train(
            run, start, initial(params) if state is None else state, frozen=frozen, texts=texts, arguments=arguments,
            step_fn=make_step(model, tx, arguments.label_smoothing),
            evaluate=make_evaluation(model, evaluation, arguments.batch_size),
            report=_report.reporter(bar, start, arguments.steps),
        )  # fmt: skip

    names = ("majority_accuracy", "probe_accuracy", "accuracy")
    result = {name: run.last(name) for name in names} | {
        "adapter_bytes": jpeft.save(directory / "adapter", jpeft.combine(state.trainable, frozen), overwrite=True),
        "model_bytes": (source / "model.safetensors").stat().st_size,
    }
    _report.draw_curves(directory / "curves.png", run.rows, result)
    run.log(step=arguments.steps, **result)
    _report.show_results(console, result, f"{arguments.method}, {arguments.base} base")
    console.print(f"run directory: {directory}")


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """What goes wrong with a model or a method is the user's to put right, and told in one line."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise UserError(" ".join(str(error).split())) from error


def _load(arguments: Arguments) -> tuple[Path, models.EncoderConfig, Any, "Tokenizer"]:
    with _one_line():
        source = arguments.model or models.minilm_directory()
        config, params, tokenizer = models.load(source)
    if tokenizer is None:
        raise UserError(f"{source} has no tokenizer.json")
    if (tokens := tokenizer.get_vocab_size()) > config.vocab_size:
        raise UserError(f"{source}: the tokenizer has {tokens} tokens, the model {config.vocab_size}")
    prompt = arguments.prompt_length if arguments.method == "prompt" else 0
    if arguments.max_length + prompt > (room := config.max_position_embeddings):
        sum_ = f"--max-length {arguments.max_length}" + (f" + --prompt-length {prompt}" if prompt else "")
        raise UserError(f"{sum_} is more than the model's {room} positions")
    if arguments.method == "last-layers" and arguments.base != "float" and arguments.layers >= config.num_hidden_layers:
        raise UserError(f"--layers {arguments.layers} leaves no layer to quantize: use fewer, or --base float")
    return source, config, params, tokenizer


def _with_steps(arguments: Arguments, texts: int) -> Arguments:
    epoch = -(-texts // arguments.batch_size)
    steps = arguments.steps or math.ceil(arguments.epochs * epoch)
    return dataclasses.replace(arguments, steps=steps, eval_every=arguments.eval_every or epoch)


def _probe(
    encoder: models.Encoder, params: Any, task: Task, texts: Texts, evaluation: Texts, arguments: Arguments
) -> tuple[dict[str, jax.Array], Row]:
    """The probe as a head to start from (Kumar et al., https://arxiv.org/abs/2202.10054), and its row of metrics."""
    size = arguments.batch_size
    seen, unseen = (features(encoder, params, part, size) for part in (texts, evaluation))
    tuning = held_out(task.train, fraction=0.2, salt="tuning")
    linear, strength = probe(seen, texts.labels, tuning, len(task.labels))
    majority = np.bincount(texts.labels).argmax()
    return {"kernel": jnp.asarray(linear.kernel), "bias": jnp.asarray(linear.bias)}, {
        "majority_accuracy": float(np.mean(evaluation.labels == majority)),
        "probe_accuracy": linear.accuracy(unseen, evaluation.labels),
        "probe_strength": strength,
    }
