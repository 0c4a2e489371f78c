"""`jpeft generate`, on a tiny Llama."""

import io
import json
import re
import shutil

import jax
import numpy as np
import pytest

import jpeft
from jpeft import hf
from jpeft.cli import main
from jpeft.testing import shaken


PROMPT = "the sky is"
COUNT = ("--max-new-tokens", "12")


def trained(params, sites=None, rank=2):
    """As after training, with LoRA."""
    trainable, frozen = jpeft.partition(jpeft.lora(params, rank=rank, sites=sites))
    return jpeft.combine(shaken(trainable, jax.random.key(rank), size=1.0), frozen)


def text(directory, params=None, model=None, **options):
    """What the model makes of the prompt."""
    loaded, base, tokenizer = hf.load(directory)
    ids = np.array([tokenizer.encode(PROMPT).ids])
    options |= {"max_new_tokens": 12, "stop_tokens": [tokenizer.token_to_id("<|end|>")], "tokenizer": tokenizer}
    return jpeft.generate(model or loaded, base if params is None else params, ids, **options).text[0]


@pytest.fixture
def generated(tiny_llama, capsys):
    """What the command shows, with further options."""

    def run(*options, prompt=("--prompt", PROMPT)):
        capsys.readouterr()
        assert main(["generate", "--model", str(tiny_llama), *COUNT, *prompt, *map(str, options)]) == 0
        return capsys.readouterr().out

    return run


def test_text_is_shown_and_nothing_else(generated, tiny_llama):
    assert generated() == text(tiny_llama) + "\n"


def test_text_may_be_in_a_file(generated, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text(PROMPT)
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    want = generated()
    assert generated(prompt=("--file", str(tmp_path / "prompt.txt"))) == want
    assert generated(prompt=("--file", "-")) == want


def test_options_are_those_of_the_library(generated, tiny_llama):
    numbers = {"temperature": 2.0, "top_k": 50, "top_p": 0.9, "min_p": 0.001, "repetition_penalty": 1.1}
    options = [word for name, x in numbers.items() for word in (f"--{name.replace('_', '-')}", x)]
    key = jax.random.fold_in(jax.random.key(3), 0)
    assert generated(*options, "--seed", 3) == text(tiny_llama, key=key, **numbers) + "\n"
    assert generated(*options, "--seed", 4) != generated(*options, "--seed", 3)


def test_stop_string_is_not_shown(generated, tiny_llama):
    whole = text(tiny_llama)
    stop = whole[2:5]
    assert generated("--stop", "@@", stop) == whole.split(stop)[0] + "\n"


def test_base_is_quantized(generated, tiny_llama):
    model, params, _ = hf.load(tiny_llama, quantize=jpeft.int4())
    assert generated("--base", "int4") == text(tiny_llama, params, model) + "\n" != generated()


@pytest.fixture(scope="module")
def adapters(tiny_llama, tmp_path_factory):
    """A directory with an adapter of PEFT's form, and one that `jpeft.save` wrote over NF4 and stacked layers."""
    directory = tmp_path_factory.mktemp("adapters")
    model, base, _ = hf.load(tiny_llama)
    hf.save_adapter(directory / "peft", trained(base), model=model)
    stacked, base, _ = hf.load(tiny_llama, scan=True)
    sites = jpeft.sites(stacked, {"params": base}, np.zeros((1, 2), int))
    jpeft.save(directory / "run/adapter", trained(jpeft.nf4(base, sites=sites), sites, rank=3))
    return directory


def with_adapter(directory, name, adapters):
    """The model, and its parameters with one of the adapters."""
    if name == "peft":
        model, base, _ = hf.load(directory)
        return model, hf.load_adapter(adapters / "peft", base, model=model)
    model, base, _ = hf.load(directory, scan=True)
    sites = jpeft.sites(model, {"params": base}, np.zeros((1, 2), int))
    return model, jpeft.restore(adapters / "run/adapter", jpeft.nf4(base, sites=sites))


@pytest.mark.parametrize(("name", "path"), [("peft", "peft"), ("run", "run/adapter"), ("run", "run")])
def test_adapter_finds_its_base(generated, tiny_llama, adapters, name, path):
    model, params = with_adapter(tiny_llama, name, adapters)
    assert generated("--adapter", adapters / path) == text(tiny_llama, params, model) + "\n" != generated()


def test_adapters_are_put_on_each_other(generated, tiny_llama, adapters):
    model, params = with_adapter(tiny_llama, "run", adapters)
    both = hf.load_adapter(adapters / "peft", params, model=model)
    assert generated("--adapter", adapters / "run", adapters / "peft") == text(tiny_llama, both, model) + "\n"


@pytest.fixture
def files(tiny_llama, tiny_model, adapters, tmp_path, monkeypatch):
    """A directory with inputs, good and bad."""
    monkeypatch.chdir(tmp_path)
    for name in ("untokenized", "strange"):
        shutil.copytree(tiny_llama, tmp_path / name)
    shutil.copytree(tiny_model, tmp_path / "bert")
    (tmp_path / "untokenized/tokenizer.json").unlink()
    config = json.loads((tmp_path / "strange/config.json").read_text())
    (tmp_path / "strange/config.json").write_text(json.dumps(config | {"model_type": "strange"}))
    for name in ("peft", "run"):
        (tmp_path / name).symlink_to(adapters / name)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "latin").write_bytes(b"\xff")
    return tmp_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give the text by --prompt TEXT or by --file FILE"),
        (("--prompt", "a", "--file", "b"), "give the text by --prompt TEXT or by --file FILE"),
        (("--file", "missing"), "cannot read missing: No such file"),
        (("--file", "latin"), "cannot read latin: it is no UTF-8 text"),
        (("--prompt", "a", "--model", "missing"), "missing"),
        (("--prompt", "a", "--model", "nothing"), "nothing has no config.json"),
        (("--prompt", "a", "--model", "strange"), "model_type 'strange'"),
        (("--prompt", "a", "--model", "untokenized"), "untokenized has no tokenizer.json"),
        (("--prompt", "a", "--model", "bert"), "bert has a model of type bert, which writes no text"),
        (("--prompt", "a", "--adapter", "nothing"), "nothing is no adapter"),
        (("--prompt", "a", "--adapter", "peft", "run"), "run/adapter was saved with the base"),
        (("--prompt", "a", "--adapter", "run", "--base", "int8"), "are not those that the checkpoint was trained"),
        (("--prompt", "a", "--base", "nf5"), "unknown base 'nf5': did you mean nf4"),
        (("--prompt", "a", "--dtype", "float64"), "unknown dtype 'float64': did you mean float"),
        (("--prompt", "a", "--top-p", "2", "--temperature", "1", "--top-k", "0"), "--top-k is 0: 1 or more; --top-p"),
        (("--prompt", "a", "--top-p", "0.5"), "--top-p: nothing is left to chance without a --temperature above 0"),
        (("--prompt", "a", "--max-new-tokens", "0"), "--max-new-tokens is 0: 1 or more"),
        (("--prompt", "a", "--max-new-tokens", "90"), "90 new ones are more than the model's 64 positions"),
        (("--prompt", "a", "--stop", ""), "--stop has an empty string"),
    ],
)
def test_bad_input(files, tiny_llama, options, message, capsys):
    assert main(["generate", "--model", str(tiny_llama), *COUNT, *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("jpeft: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_help_explains_every_option(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    options = re.findall(r"^[│ ]*(--[a-z-]+) +.*?\s{2,}(\S.*)", shown, re.MULTILINE)
    own = {"generate": {"--prompt", "--file"}, "chat": {"--system", "--context"}}[command]
    assert {name for name, _ in options} >= own | {"--model", "--adapter", "--base", "--stop", "--temperature"}
    assert len(re.findall(r"^[│ ]*--", shown, re.MULTILINE)) == len(options)
