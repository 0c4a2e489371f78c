"""Fine-tuning of a causal model from end to end, on a tiny one."""

import contextlib
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft import hf
from jpeft.cli import _run, _train, main
from jpeft.cli._arguments import Arguments
from jpeft.cli._causal import Causal
from jpeft.cli._methods import METHODS, resolve, transform
from jpeft.cli._train import State, make_evaluation, make_step


@pytest.fixture(scope="module")
def task(tiny_llama, pairs):
    """A task whose samples have rows of their own, and its parameters, with arrays of LoRA that are not zero."""
    arguments = Arguments(model=tiny_llama, data=pairs, eval_data=pairs, max_length=32, base="float", pack=False)
    made = Causal(arguments := resolve(arguments, Causal))
    trainable, frozen = jpeft.partition(jax.jit(transform(arguments, made))(made.params))
    noise = lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)
    return made, jax.tree.map(noise, trainable), frozen


def test_a_packed_row_has_the_losses_of_its_samples(task, tiny_llama, pairs):
    apart, trainable, frozen = task
    arguments = Arguments(model=tiny_llama, data=pairs, eval_data=pairs, max_length=32, base="float")
    packed = Causal(resolve(arguments, Causal))
    assert len(packed.train) < len(apart.train) == 12
    found = [make_evaluation(made, 4)(trainable, frozen)["evaluation_loss"] for made in (packed, apart)]
    np.testing.assert_allclose(*found, rtol=1e-6)


def test_the_loss_is_the_mean_over_what_counts(task):
    """Against the logits of the model."""
    made, trainable, frozen = task
    batch = made.train.batch(range(12), 12)
    params = {"params": jpeft.combine(trainable, frozen)}
    logits = jax.jit(lambda params: jpeft.apply(made.model, params, batch.input_ids, batch.segment_ids))(params)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch.input_ids[:, 1:])
    mean = np.mean(losses[batch.labels[:, 1:] != -100])
    row = make_evaluation(made, 4)(trainable, frozen)
    np.testing.assert_allclose(row["evaluation_loss"], mean, rtol=1e-5)
    np.testing.assert_allclose(row["perplexity"], np.exp(mean), rtol=1e-5)


def test_accumulated_steps_are_those_of_the_large_batch(task):
    """Also where the microbatches have different numbers of tokens that count."""
    made, trainable, frozen = task
    batch = made.train.train_batch(0, 8, seed=0)
    batch.labels[:3, : batch.labels.shape[1] // 2] = -100
    batch = batch._replace(weights=np.sum(batch.labels[:, 1:] != -100, axis=1).astype(np.float32))
    counts = batch.weights.reshape(4, 2).sum(axis=1)
    assert len(set(counts)) > 1
    step = make_step(made, tx := optax.sgd(1.0))
    found = []
    for parts in (1, 4):
        state = State(jax.tree.map(jnp.copy, trainable), tx.init(trainable))
        found.append(step(state, frozen, jax.tree.map(lambda x, n=parts: x.reshape(n, -1, *x.shape[1:]), batch)))
    (one, loss), (four, same) = found
    np.testing.assert_allclose(loss, same, rtol=1e-6)
    moved = lambda state: jax.tree.map(jnp.subtract, state.trainable, trainable)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), moved(one), moved(four))


OPTIONS = ("--batch-size", "2", "--accumulate", "2", "--max-length", "32", "--rank", "4", "--learning-rate", "0.05",
           "--eval-every", "10", "--save-every", "10", "--patience", "9", "--remat", "full")  # fmt: skip


def command(tiny_llama, pairs, output, *options):
    """The command line of a run."""
    files = ("--model", str(tiny_llama), "--data", str(pairs), "--eval-data", str(pairs), "--output", str(output))
    return ["finetune", *files, *OPTIONS, *options]


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tiny_llama, pairs, tmp_path_factory):
    """The directory of a run that nothing interrupted, and what it printed."""
    directory, out = tmp_path_factory.mktemp("whole") / "run", io.StringIO()
    with jax.numpy_dtype_promotion("standard"), contextlib.redirect_stdout(out):
        assert main(command(tiny_llama, pairs, directory, "--steps", "40")) == 0
    return directory, out.getvalue()


def test_a_small_set_is_memorized(whole):
    run, out = whole
    names = {"adapter", "peft", "config.json", "curves.png", "metrics.jsonl", "state", "best"}
    assert {path.name for path in run.iterdir()} == names
    *_, evaluation, last = metrics(run)
    assert evaluation["perplexity"] < 1.5 < 1000 < last["start_perplexity"]
    assert last["perplexity"] == evaluation["perplexity"]
    assert "tokens/s" in out and "12 samples" in out and f"{last['perplexity']:.3f}" in out


def test_both_forms_of_the_adapter_are_the_trained_one(whole, tiny_llama, pairs):
    run, _ = whole
    made = Causal(arguments := resolve(Arguments(model=tiny_llama, data=pairs, eval_data=pairs, max_length=32), Causal))
    evaluate = make_evaluation(made, arguments.batch_size)
    wanted = metrics(run)[-1]["perplexity"]
    for params in (jpeft.restore(run / "adapter", made.params),
                   hf.load_adapter(run / "peft", made.params, model=made.model)):  # fmt: skip
        assert evaluate(*jpeft.partition(params))["perplexity"] == pytest.approx(wanted, rel=1e-4)
    config = json.loads((run / "peft/adapter_config.json").read_text())
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", str(tiny_llama))


@pytest.mark.slow
def test_a_resumed_run_ends_as_a_whole_one(whole, tiny_llama, pairs, tmp_path, monkeypatch):
    run, other = tmp_path / "run", whole[0]
    calls = iter(range(1, 14))
    with monkeypatch.context() as patch:
        ends = contextlib.nullcontext(lambda: next(calls) == 13)
        patch.setattr(_train, "interruptions", lambda: ends)
        assert main(command(tiny_llama, pairs, run, "--steps", "40")) == 130
    assert main(["finetune", "--resume", "--output", str(run)]) == 0
    mine, theirs = metrics(run), metrics(other)
    del mine[-1]["adapter_bytes"], theirs[-1]["adapter_bytes"]  # the names of Orbax's files are of various lengths
    assert mine == theirs
    for part in ("adapter", "state", "best"):
        (_, left), (_, right) = _run.read(run / part), _run.read(other / part)
        assert left.keys() == right.keys()
        assert all(np.asarray(x).tobytes() == np.asarray(right[name]).tobytes() for name, x in left.items())
    name = "peft/adapter_model.safetensors"
    assert (run / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_learns(tiny_llama, pairs, tmp_path, method, capsys):
    sizes = ("--method", method, "--layers", "1", "--prompt-length", "4", "--block", "4")
    line = command(tiny_llama, pairs, tmp_path / "run", *sizes, "--steps", "8", "--learning-rate", "3e-3")
    if method == "bitfit":
        assert main(line) == 2
        assert "no parameter named `bias`" in capsys.readouterr().err
        return
    assert main(line) == 0
    losses = [row["evaluation_loss"] for row in metrics(tmp_path / "run") if "evaluation_loss" in row]
    assert losses[-1] < losses[0]
    assert (tmp_path / "run/peft").exists() == METHODS[method].peft
