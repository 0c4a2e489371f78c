"""Bad input of a causal run: one line, exit code 2, and nothing is written."""

import shutil

import pytest
from causal import write_rows
from safetensors.numpy import load_file, save_file

from jpeft.cli import main
from jpeft.cli._arguments import Arguments
from jpeft.cli._causal import Causal
from jpeft.cli._methods import resolve


@pytest.fixture
def files(tiny_llama, tmp_path, monkeypatch):
    """A directory with checkpoints that lack something, and rows that are none."""
    monkeypatch.chdir(tmp_path)
    for name in ("untokenized", "endless", "headless"):
        shutil.copytree(tiny_llama, tmp_path / name)
    (tmp_path / "untokenized/tokenizer.json").unlink()
    (tmp_path / "endless/tokenizer_config.json").unlink()
    tensors = load_file(path := tmp_path / "headless/model.safetensors")
    save_file({name: x for name, x in tensors.items() if "lm_head" not in name}, path)
    write_rows(tmp_path / "bad.jsonl", [{"prompt": 3}])
    (tmp_path / "broken.jsonl").write_text('{"text": "c"}\n{oops\n')
    return tmp_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--task", "docstrings", "--label-smoothing", "0.2"), "--task, --label-smoothing: not for causal models"),
        (("--max-length", "65"), "--max-length 65 is more than the model's 64 positions"),
        (("--method", "prompt", "--max-length", "60"), "--max-length 60 + --prompt-length 20 is more than"),
        (("--data", "missing.jsonl"), "cannot read missing.jsonl"),
        (("--data", "bad.jsonl"), "bad.jsonl:1: not one of {"),
        (("--eval-data", "broken.jsonl"), "broken.jsonl:2: not JSON"),
        (("--loss-on", "completions"), "unknown loss-on 'completions': did you mean completion?"),
        (("--remat", "everything"), "There are: none, full, dots, dots_no_batch"),
        (("--dtype", "float16"), "There are: float32, bfloat16"),
        (("--method", "bitfit"), "no parameter named `bias`"),
        (("--model", "untokenized"), "untokenized has no tokenizer.json"),
        (("--model", "endless"), "endless has no end-of-sequence token"),
        (("--model", "headless"), "missing"),
    ],
)
def test_bad_input(files, tiny_llama, pairs, options, message, capsys):
    given = ("--model", str(tiny_llama), "--data", str(pairs), "--max-length", "32", "--output", "run")
    assert main(["finetune", *given, *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("jpeft: ") and error.count("\n") == 1
    assert not (files / "run").exists()


def test_rows_are_needed(tiny_llama, tmp_path, capsys):
    assert main(["finetune", "--model", str(tiny_llama)]) == 2
    assert "--data FILE" in capsys.readouterr().err
    few = write_rows(tmp_path / "few.jsonl", [{"text": "the sky"}] * 5)
    assert main(["finetune", "--model", str(tiny_llama), "--data", str(few), "--max-length", "32"]) == 2
    assert "too few rows to hold some out" in capsys.readouterr().err


def test_rows_of_one_prompt_are_held_out_together(tiny_llama, tmp_path):
    pairs = [{"prompt": f"the {n // 2}", "completion": " sky" * (n % 2 + 1)} for n in range(60)]
    data = write_rows(tmp_path / "pairs.jsonl", pairs)
    made = Causal(resolve(Arguments(model=tiny_llama, data=data, max_length=32, base="float"), Causal))
    groups = [{sample.group for sample in part.samples} for part in (made.train, made.evaluation)]
    assert len(made.evaluation.samples) == 6 and not groups[0] & groups[1]
