"""The command from end to end, on a tiny model."""

import json
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import jpeft
from jpeft.cli import _run, _train, main
from jpeft.cli._arguments import Arguments
from jpeft.cli._classification import Classification
from jpeft.cli._methods import BASES, METHODS, resolve, transform


COMMON = ("--batch-size", "8", "--steps", "9", "--eval-every", "4", "--save-every", "4")
ONE_SHAPE = ("--max-length", "5")  # all texts are longer
SHAPES = ("--max-length", "16")


@pytest.fixture
def command(tiny_model, data, tmp_path, monkeypatch):
    """The command line of a run into `tmp_path/run`, with further options."""
    monkeypatch.chdir(tmp_path)
    return ["finetune", "--model", str(tiny_model), "--data", str(data), "--output", "run", *COMMON]


def rows(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def arrays(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


SLOW = pytest.mark.slow
OFTEN = ("lora", "prompt")
RUNS = [(method, None) for method in OFTEN]
RUNS += [pytest.param("lora", base, marks=SLOW) for base in BASES if base != "nf4"]
RUNS += [pytest.param(method, None, marks=SLOW) for method in METHODS if method not in OFTEN]


@pytest.mark.parametrize(("method", "base"), RUNS)
def test_run_directory_is_complete(command, tmp_path, method, base, capsys):
    options = ["--base", base] if base else ["--layers", "1", "--block", "4", "--rank", "4"]
    assert main([*command, *ONE_SHAPE, "--method", method, *options]) == 0
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {"adapter", "config.json", "curves.png", "metrics.jsonl", "state"}
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((run / "config.json").read_text())["arguments"]
    base = base or METHODS[method].base
    assert (config["method"], config["base"], config["steps"]) == (method, base, 9)
    found = rows(run)
    assert [row["step"] for row in found if "loss" in row] == list(range(1, 10))
    assert [row["step"] for row in found if "evaluation_loss" in row] == [0, 4, 8, 9]
    assert found[-1]["adapter_bytes"] == sum(map(len, arrays(run / "adapter").values()))
    assert found[-1]["majority_accuracy"] == 0.5
    out = capsys.readouterr().out
    assert "parameters train" in out
    assert f"{found[-1]['accuracy']:.1%}" in out



@pytest.mark.slow
@pytest.mark.parametrize(("method", "base"), [("lora", "nf4"), ("prompt", "float")])
def test_adapter_is_what_was_evaluated(command, tmp_path, tiny_model, data, method, base):
    options = ["--eval-data", str(data), "--method", method, "--base", base]
    assert main([*command, *ONE_SHAPE, *options]) == 0
    given = Arguments(model=tiny_model, data=data, eval_data=data, max_length=5, method=method, base=base)
    task = Classification(arguments := resolve(given, Classification))
    params = jpeft.restore(tmp_path / "run/adapter", transform(arguments, task)(task.params))
    (_, batch), = task.evaluation.all_batches(60)
    logits = jpeft.apply(task.model, {"params": params}, batch.tokens, batch.mask)
    right = np.mean(np.argmax(logits, axis=1) == batch.labels)
    assert right == pytest.approx(rows(tmp_path / "run")[-1]["accuracy"])


def stop_after(step, monkeypatch, how):
    """Ends a run at a step, as Ctrl-C does or as a kill does."""
    if how == "interrupt":
        calls = iter(range(1, step + 1))
        ends = _train.contextlib.nullcontext(lambda: next(calls) == step)
        monkeypatch.setattr(_train, "interruptions", lambda: ends)
        return
    log = _run.Run.log

    def killed(self, **row):
        if row["step"] == step and "loss" in row:
            with (self.directory / "metrics.jsonl").open("a") as file:
                file.write('{"step": ')
            raise SystemError("killed")
        return log(self, **row)

    monkeypatch.setattr(_run.Run, "log", killed)


@pytest.fixture(scope="module")
def whole(tiny_model, data, tmp_path_factory):
    """The directory of a run that nothing interrupted."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    options = ["--model", str(tiny_model), "--data", str(data), "--output", str(directory)]
    with jax.numpy_dtype_promotion("standard"):
        assert main(["finetune", *options, *COMMON, *SHAPES]) == 0
    return directory


@pytest.mark.parametrize("how, step", [("interrupt", 3), *(pytest.param("kill", n, marks=SLOW) for n in (2, 7))])
def test_resumed_run_ends_as_a_whole_one(command, tmp_path, whole, monkeypatch, how, step, capsys):
    with monkeypatch.context() as patch:
        stop_after(step, patch, how)
        if how == "interrupt":
            assert main([*command, *SHAPES]) == 130
            assert "jpeft finetune --resume --output run" in capsys.readouterr().out
        else:
            with pytest.raises(SystemError, match="killed"):
                main([*command, *SHAPES])
    assert not (tmp_path / "run/adapter").exists()
    assert main(["finetune", "--resume", "--output", "run"]) == 0
    mine, other = rows(tmp_path / "run"), rows(whole)
    del mine[-1]["adapter_bytes"], other[-1]["adapter_bytes"]  # the names of Orbax's files are of various lengths
    assert mine == other
    for part in ("adapter", "state"):
        same_arrays(tmp_path / "run" / part, whole / part)


def same_arrays(left, right):
    (_, mine), (_, other) = _run.read(left), _run.read(right)
    assert mine.keys() == other.keys()
    for name, x in mine.items():
        assert np.asarray(x).tobytes() == np.asarray(other[name]).tobytes(), name


def test_a_run_that_diverges_ends_with_what_was_good(command, tmp_path, capsys):
    options = ["--learning-rate", "1e30", "--warmup", "0", "--skip-limit", "3"]
    assert main([*command, *ONE_SHAPE, *options]) == 2
    captured = capsys.readouterr()
    assert "step 4 skipped: loss or gradient not finite, 3 in a row" in captured.out
    assert "run/state holds the state that step 1 left" in captured.err
    assert "batch-4.safetensors" in captured.err and (tmp_path / "run/batch-4.safetensors").exists()
    assert [row["loss"] is None for row in rows(tmp_path / "run") if "loss" in row] == [False, True, True, True]
    _, state = _run.read(tmp_path / "run/state")
    assert all(np.isfinite(x).all() for x in state.values())


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(command, tmp_path):
    program = "import sys; from jpeft.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = [*command, *ONE_SHAPE, "--steps", "100000"]
    process = subprocess.Popen([sys.executable, "-c", program, *arguments], text=True, stdout=subprocess.PIPE)
    metrics, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and '"loss"' in metrics.read_text()):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "jpeft finetune --resume --output run" in out
    step, state = _run.Run(tmp_path / "run").load({})
    assert step == rows(tmp_path / "run")[-1]["step"] > 0
    assert f"saved after step {step}" in out
    assert state is not None
