"""Methods side by side on one task: what they reach, what they cost, and what the model forgets.

    python experiments/compare_methods.py --output runs/compare

The task is the default of `jpeft finetune`: which keyword is masked in a line of the standard library's code? Every
method gets the same steps, data and schedule, and its own learning rate. A method that has its row in
`--output`/results.jsonl is not run again. Writes results.jsonl, table.md and plot.png; the columns:

- accuracy: on the texts held out for evaluation, after the last step.
- trainable: how many numbers train, the task's head among them.
- adapter: bytes on disk of what `jpeft.save` writes.
- memory: bytes of a step on the longest batch, arguments and temporaries, by the compiler's account.
- GFLOP: of that step, by the compiler's account.
- forgetting: by how much a loss outside the task has grown: how well the encoder tells the second half of a docstring
  of the standard library from those of others by its first half (cross-entropy over 64 candidates).
"""

import argparse
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer

import jpeft
from jpeft import models
from jpeft.cli._arguments import Arguments
from jpeft.cli._classification import Classification
from jpeft.cli._data import Batch, Example, Texts
from jpeft.cli._docstrings import docstrings
from jpeft.cli._train import learning_rate, make_evaluation


CANDIDATES, TEMPERATURE = 64, 0.05  # of the loss outside the task; the temperature is that the encoder was trained with


class Contender(NamedTuple):
    """A method in the comparison: `make(params, task)`, its learning rate, and its optimizer."""

    make: Callable
    rate: float
    optimizer: Callable = functools.partial(optax.adamw, weight_decay=0.0)


def kernels(transform, **options):
    return lambda params, task: transform(params, sites=task.sites, **options)


def whole_encoder(params, task):
    return jpeft.unfreeze(params, targets="encoder/.*")


def fish(params, task, batches=8):
    """A two-hundredth of the encoder, by the Fisher information of some batches."""
    seen = (task.train.train_batch(n, 32, 0) for n in range(batches))
    mask = jpeft.fish_mask(task.loss, params, seen, density=0.005, targets="encoder/.*")
    return jpeft.sparse(params, mask=mask, sites=task.sites)


CONTENDERS = {
    "full": Contender(whole_encoder, 5e-5),
    "galore": Contender(whole_encoder, 1e-3, functools.partial(jpeft.optim.galore, rank=64)),
    "last_layers": Contender(lambda params, task: jpeft.last_layers(params, k=2), 2e-4),
    "bitfit": Contender(lambda params, task: jpeft.bitfit(params, targets="encoder/.*bias"), 4e-3),
    "fish": Contender(fish, 1e-3),
    "shira": Contender(kernels(jpeft.shira, rank=8), 3e-3),
    "lora": Contender(kernels(jpeft.lora, rank=8, alpha=16), 1e-3),
    "dora": Contender(kernels(jpeft.dora, rank=8, alpha=16), 1e-3),
    "pissa": Contender(kernels(jpeft.pissa, rank=8, alpha=16), 3e-4),
    "qlora": Contender(lambda params, task: jpeft.lora(jpeft.nf4(params, sites=task.sites), rank=8, alpha=16), 1e-3),
    "vera": Contender(kernels(jpeft.vera), 1e-2),
    "lokr": Contender(kernels(jpeft.lokr, alpha=16), 1e-3),
    "oft": Contender(kernels(jpeft.oft), 1e-3),
    "ia3": Contender(kernels(jpeft.ia3), 8e-3),
}


def make_forgetting(task, texts=512, seed=0):
    """`params -> loss`: the mean cross-entropy of the right second half among `CANDIDATES`."""
    model = models.Embedder(task.model.config, normalize=True)
    found = docstrings()
    words = [found[n].text.split() for n in np.random.default_rng(seed).choice(len(found), texts, replace=False)]
    tokenizer = Tokenizer.from_file(str(task.source / "tokenizer.json"))
    tokenized = lambda halves: Texts([Example(" ".join(half), "", "") for half in halves], [""], tokenizer, 64)
    first, second = tokenized([w[: len(w) // 2] for w in words]), tokenized([w[len(w) // 2 :] for w in words])

    @jax.jit
    def loss(params, first, second):
        embed = lambda batch: jpeft.apply(model, {"params": params}, batch.tokens, batch.mask)
        logits = embed(first) @ embed(second).T / TEMPERATURE
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(CANDIDATES)).mean()

    def mean(params):
        only = {name: x for name, x in params.items() if name != "head"}
        rows = np.arange(texts).reshape(-1, CANDIDATES)
        return float(np.mean([loss(only, first.batch(r, CANDIDATES), second.batch(r, CANDIDATES)) for r in rows]))

    return mean


def run(contender, task, params, arguments, forgetting, directory):
    """The row of results of one method: everything but its name."""
    tuned = jpeft.unfreeze(contender.make(params, task), targets="head/.*")
    trainable, frozen = jpeft.partition(tuned)
    trainable = jax.tree.map(jnp.copy, trainable)  # a step uses up its arguments, and others start from these, too
    schedule = learning_rate(arguments)
    tx = optax.chain(optax.clip_by_global_norm(arguments.clip), contender.optimizer(schedule))
    opt_state = tx.init(trainable)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trainable, opt_state, frozen, batch):
        mean = lambda t: task.loss(jpeft.combine(t, frozen), batch) / batch.weights.sum()
        value, gradients = jax.value_and_grad(mean)(trainable)
        updates, opt_state = tx.update(gradients, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, value

    size, length = arguments.batch_size, arguments.max_length
    of = jax.ShapeDtypeStruct
    longest = Batch(of((size, length), int), of((size, length), int), of((size,), int), of((size,), np.float32))
    compiled = step.lower(trainable, opt_state, frozen, longest).compile()
    memory = compiled.memory_analysis()

    for n in track(range(arguments.steps), description="training", transient=True):
        batch = task.train.train_batch(n, size, arguments.seed)
        trainable, opt_state, value = step(trainable, opt_state, frozen, batch)
        if not math.isfinite(value):
            raise SystemExit(f"the loss is {value} at step {n + 1}: lower the learning rate")
    tuned = jpeft.combine(trainable, frozen)
    return {
        "accuracy": make_evaluation(task, size)(trainable, frozen)["accuracy"],
        "trainable": jpeft.summary(tuned).trainable,
        "adapter": jpeft.save(directory / "adapter", tuned, overwrite=True),
        "memory": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "GFLOP": compiled.cost_analysis()["flops"] / 1e9,
        "forgetting": forgetting(tuned) - forgetting(params),
    }


FORMATS = {"accuracy": "{:.1%}", "trainable": "{:,}", "adapter": "{:,}", "memory": "{:,}", "GFLOP": "{:.0f}",
           "forgetting": "{:+.2f}"}  # fmt: skip


def table(rows):
    """The results in Markdown."""
    lines = [["method", *FORMATS], ["---", *["---:"] * len(FORMATS)]]
    lines += [[row["method"], *(FORMATS[name].format(row[name]) for name in FORMATS)] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plot(rows, path):
    """Accuracy over the parameters that train, and forgetting over accuracy."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, x, y in ((left, "trainable", "accuracy"), (right, "accuracy", "forgetting")):
        axes.set(xlabel=x, ylabel=y, xscale="log" if x == "trainable" else "linear")
        for row in rows:
            axes.plot(row[x], row[y], "o")
            axes.annotate(row["method"], (row[x], row[y]), xytext=(4, 4), textcoords="offset points")
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="METHOD",
                        help=f"of {', '.join(CONTENDERS)}; all if left out")  # fmt: skip
    parser.add_argument("--steps", type=int, default=180, help="two epochs by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/compare"))
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    console, path = Console(), given.output / "results.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    setting = {"steps": given.steps, "seed": given.seed}

    plain = Arguments(steps=given.steps, seed=given.seed, max_length=64, batch_size=32, learning_rate=1.0)
    task = Classification(plain)
    params, start = task.start(plain)
    console.print(task.describe(), f"; linear probe {start['probe_accuracy']:.1%}")
    forgetting = make_forgetting(task)
    console.print(f"loss outside the task before training: {forgetting(params):.3f}")
    for name in given.methods:
        if any(row["method"] == name and setting.items() <= row.items() for row in rows):
            continue
        contender = CONTENDERS[name]
        arguments = Arguments(**{**vars(plain), "learning_rate": contender.rate})
        found = run(contender, task, params, arguments, forgetting, (given.output / name).absolute())
        rows.append({"method": name, "learning_rate": contender.rate, **setting, **found})
        with path.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        console.print({"method": name, **found})
        jax.clear_caches()
    rows = [row for row in rows if setting.items() <= row.items()]
    (given.output / "table.md").write_text(table(rows))
    plot(rows, given.output / "plot.png")
    console.print(table(rows))


if __name__ == "__main__":
    main()
