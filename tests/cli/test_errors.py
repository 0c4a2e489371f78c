"""Bad input: one line, exit code 2, and nothing is destroyed."""

import json
import shutil

import pytest
from tokenizers import Tokenizer

from jpeft.cli import main


ROWS = [{"text": f"apple number {n}", "label": "xy"[n % 2]} for n in range(20)]


@pytest.fixture
def files(tiny_model, tmp_path, monkeypatch):
    """A directory with inputs, good and bad."""
    monkeypatch.chdir(tmp_path)

    def jsonl(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    jsonl("good.jsonl", ROWS)
    jsonl("new-label.jsonl", [*ROWS, {"text": "a", "label": "z"}])
    jsonl("one-label.jsonl", ROWS[::2])
    jsonl("few.jsonl", ROWS[:2])
    (tmp_path / "malformed.jsonl").write_text(json.dumps(ROWS[0]) + '\n{"text": "a"}\n')
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "nothing").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/precious").write_text("data")
    shutil.copytree(tiny_model, tmp_path / "model")
    for name in ("untokenized", "truncated", "strange", "words"):
        shutil.copytree(tiny_model, tmp_path / name)
    (tmp_path / "untokenized/tokenizer.json").unlink()
    (tmp_path / "truncated/model.safetensors").write_bytes(b"\0\0")
    config = json.loads((tmp_path / "strange/config.json").read_text())
    (tmp_path / "strange/config.json").write_text(json.dumps(config | {"model_type": "strange"}))
    tokenizer = Tokenizer.from_file(str(tmp_path / "words/tokenizer.json"))
    tokenizer.add_tokens(["one", "too", "many"])
    tokenizer.save(str(tmp_path / "words/tokenizer.json"))
    return tmp_path


DATA = ("--data", "good.jsonl", "--max-length", "16", "--output", "run")
GOOD = ("--model", "model", *DATA)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((*GOOD, "--data", "missing.jsonl"), "cannot read missing.jsonl: No such file"),
        ((*GOOD, "--data", "nothing"), "cannot read nothing: Is a directory"),
        ((*GOOD, "--data", "empty.jsonl"), "empty.jsonl is empty"),
        ((*GOOD, "--data", "malformed.jsonl"), "malformed.jsonl:2: not a row"),
        ((*GOOD, "--data", "one-label.jsonl"), "two labels or more"),
        ((*GOOD, "--data", "few.jsonl"), "too few texts"),
        ((*GOOD, "--eval-data", "new-label.jsonl"), "only in evaluation, which cannot be learned: z"),
        ((*GOOD, "--eval-data", "missing.jsonl"), "cannot read missing.jsonl"),
        (("--eval-data", "good.jsonl"), "--eval-data needs --data"),
        ((*GOOD, "--method", "lorra"), "unknown method 'lorra': did you mean lora"),
        ((*GOOD, "--method", "zzz"), "There are: lora, bitfit, norms"),
        ((*GOOD, "--loss-on", "all", "--no-pack"), "--loss-on, --pack: not for classification models, which model is"),
        ((*GOOD, "--base", "nf5"), "unknown base 'nf5': did you mean nf4"),
        ((*GOOD, "--schedule", "linaer"), "unknown schedule 'linaer': did you mean linear"),
        ((*GOOD, "--method", "full", "--base", "int8"), "leaves none to --base int8: use --base float"),
        ((*GOOD, "--rank", "0"), "--rank must be 1 or more, not 0"),
        ((*GOOD, "--accumulate", "0"), "--accumulate must be 1 or more, not 0"),
        ((*GOOD, "--patience", "0"), "--patience must be 1 or more, not 0"),
        ((*GOOD, "--learning-rate", "nan"), "--learning-rate must be a positive number"),
        ((*GOOD, "--warmup", "1"), "--warmup is a share"),
        ((*GOOD, "--max-length", "41"), "--max-length 41 is more than the model's 40 positions"),
        ((*GOOD, "--method", "prompt", "--prompt-length", "25"), "--max-length 16 + --prompt-length 25 is more than"),
        ((*GOOD, "--method", "last-layers", "--layers", "2"), "leaves none to --base nf4: use --base float"),
        ((*GOOD, "--method", "last-layers", "--layers", "3", "--base", "float"), "has the layers [-3]"),
        ((*DATA, "--model", "missing"), "missing has no config.json"),
        ((*DATA, "--model", "nothing"), "nothing has no config.json"),
        ((*DATA, "--model", "strange"), "model_type 'strange'; supported: "),
        ((*DATA, "--model", "truncated"), "model.safetensors"),
        ((*DATA, "--model", "untokenized"), "untokenized has no tokenizer.json"),
        ((*DATA, "--model", "words"), "the tokenizer has 17 tokens, the model 14"),
        ((*GOOD, "--output", "taken"), "taken exists and is not empty"),
        ((*GOOD, "--output", "good.jsonl"), "good.jsonl exists and is not empty"),
        (("--resume",), "--resume needs the run directory"),
        (("--resume", "--output", "taken"), "there is no run to resume in taken"),
        (("--resume", "--output", "absent"), "there is no run to resume in absent"),
    ],
)
def test_bad_input(files, options, message, capsys):
    before = {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}
    assert main(["finetune", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("jpeft: ")
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in files.rglob("*") if path.is_file()} == before
    assert not (files / "run").exists()


@pytest.fixture
def run(files, capsys):
    """A run of two steps, in `run`."""
    assert main(["finetune", *GOOD, "--steps", "2"]) == 0
    capsys.readouterr()
    return files / "run"


def test_resumed_run_keeps_arguments_and_texts(run, files, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    resume = ["finetune", "--resume", "--output", "run"]
    assert main([*resume, "--rank", "4", "--steps", "3"]) == 2
    assert "--rank is 4, was 8; --steps is 3, was 2" in capsys.readouterr().err
    (files / "good.jsonl").write_text((files / "new-label.jsonl").read_text())
    assert main(resume) == 2
    assert "not those that the run in run was started with" in capsys.readouterr().err
    (run / "config.json").write_text("{}")
    assert main(resume) == 2
    assert "run/config.json is no config" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} | {
        run / "config.json": before[run / "config.json"]
    }


@pytest.mark.parametrize("name", ["metrics.jsonl", "state"])
def test_damaged_run_is_not_resumed(run, name, capsys):
    for path in [run / name] if name == "metrics.jsonl" else (run / name).glob("arrays-*/**/*"):
        if path.is_file():
            path.unlink()
    assert main(["finetune", "--resume", "--output", "run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("jpeft: the run in run cannot go on: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(("argv", "code"), [([], 2), (["--help"], 0)])
def test_help_lists_the_commands(argv, code, capsys):
    assert main(argv) == code
    assert "finetune" in capsys.readouterr().out


def test_unknown_command(capsys):
    assert main(["finetun"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("jpeft: unknown command 'finetun': did you mean finetune")
    assert error.endswith("There are: finetune, generate, chat, plan\n")


def test_help_has_every_option(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["finetune", "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert all(option in out for option in ("--model", "--data", "--method", "--base", "--resume", "--output"))
