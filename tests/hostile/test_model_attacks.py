"""Directories of models made to do harm."""

import json

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file
from watch import watching

from jpeft import hf


CONFIG, INDEX = "config.json", "model.safetensors.index.json"


def fields(name, **given):
    """Changes fields of a JSON file."""

    def change(directory):
        path = directory / name
        path.write_text(json.dumps(json.loads(path.read_text()) | given))

    return change


def linked(name, target):
    def change(directory):
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(target)

    return change


def places(shard):
    """Has an index say that all tensors are there."""

    def change(directory):
        path = directory / INDEX
        index = json.loads(path.read_text())
        path.write_text(json.dumps(index | {"weight_map": dict.fromkeys(index["weight_map"], shard)}))

    return change


def text(name, content):
    return lambda directory: (directory / name).write_bytes(content)


def unheaded(directory):
    """Takes the head away, which a task then makes, of as many labels as the config says."""
    arrays = load_file(directory / "model.safetensors")
    save_file({n: x for n, x in arrays.items() if "classifier" not in n}, directory / "model.safetensors")
    fields(CONFIG, id2label={}, num_labels=10**12)(directory)


REFUSED = {
    "layers beyond the tensors": ("llama", fields(CONFIG, num_hidden_layers=10**9), "num_hidden_layers"),
    "experts beyond the tensors": ("mixtral", fields(CONFIG, num_local_experts=10**9), "num_local_experts"),
    "heads beyond the tensors": ("llama", fields(CONFIG, head_dim=2**40), "head_dim"),
    "heads of no width": ("llama", fields(CONFIG, num_attention_heads=0, head_dim=None), "sizes that cannot be"),
    "a size that is true": ("llama", fields(CONFIG, num_key_value_heads=True), "num_key_value_heads=True"),
    "a size in a float": ("llama", fields(CONFIG, num_key_value_heads=1.5), "num_key_value_heads=1.5"),
    "an object for a number": ("llama", fields(CONFIG, rope_theta=[1], rope_parameters=None), "config.json"),
    "code of a stranger": ("llama", fields(CONFIG, trust_remote_code=True), "trust_remote_code"),
    "an architecture to import": ("bert_classification", fields(CONFIG, architectures=["os.system"]), "not supported"),
    "architectures that are none": ("bert_classification", fields(CONFIG, architectures={"a": 1}), "a list of names"),
    "labels that are none": ("bert_classification", fields(CONFIG, id2label=[1]), "config.json"),
    "a model_type in a list": ("llama", fields(CONFIG, model_type=["llama"]), "model_type"),
    "shards out of the directory": ("llama sharded", places("../x"), "not in this directory"),
    "shards at a root": ("llama sharded", places("/etc/passwd"), "not in this directory"),
    "a shard of a long name": ("llama sharded", places("x" * 5000), "not in this directory"),
    "a shard of no name": ("llama sharded", places(""), "not in this directory"),
    "a shard with a surrogate": ("llama sharded", places("\ud800"), "surrogates not allowed"),
    "a map of numbers": ("llama sharded", places(1), "no weight_map"),
    "a tokenizer elsewhere": ("llama", linked("tokenizer.json", "/etc/passwd"), "link out of its directory"),
    "a template elsewhere": ("llama", linked("chat_template.jinja", "/etc/passwd"), "link out of its directory"),
    "a tokenizer that is none": ("llama", text("tokenizer.json", b"[" * 10**5), "describes no tokenizer"),
    "a tokenizer of other text": ("llama", text("tokenizer.json", b"\xff"), "describes no tokenizer"),
    "a template of other text": ("llama", text("chat_template.jinja", b"\xff"), "that is no text"),
    "a template in numbers": ("llama", fields("tokenizer_config.json", chat_template=[{"name": 1}]), "that is no text"),
    "tokens that are none": ("llama", fields("generation_config.json", eos_token_id=[[2]]), "no token"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_harm_is_refused(name, model, tmp_path):
    seed, change, words = REFUSED[name]
    model.write(seed, tmp_path / "seed")
    model.read(seed, tmp_path / "seed")
    model.write(seed, tmp_path / "case")
    change(tmp_path / "case")
    with watching(tmp_path / "case") as watched, pytest.raises(hf.FormatError) as error:
        model.read(seed, tmp_path / "case")
    assert words in str(error.value)
    assert watched.faults == []
    assert watched.seconds < 2 and watched.peak < 2**26


def test_a_head_is_not_made_of_any_size(model, tmp_path):
    model.write("bert_classification", tmp_path)
    unheaded(tmp_path)
    with pytest.raises(hf.FormatError, match="num_labels=1000000000000"):
        hf.load(tmp_path, task="classification")
    _, params, _ = hf.load(tmp_path, task="classification", num_labels=3)
    assert params["head"]["kernel"].shape[-1] == 3


SANDBOXED = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{% include '/etc/passwd' %}",
    "{{ messages.append(1) }}",
)


@pytest.mark.parametrize("template", SANDBOXED)
def test_a_template_stays_in_its_sandbox(template, model, tmp_path):
    model.write("llama", tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    chat = hf.load_chat_template(tmp_path)
    with pytest.raises(ValueError, match="the chat template refuses"):
        chat.render([{"role": "user", "content": "a"}])


def test_a_panic_is_the_documented_error(model, tmp_path, monkeypatch):
    """What a library in Rust raises where it should not is no `Exception`."""

    class PanicException(BaseException):
        pass

    class Tokenizer:
        @staticmethod
        def from_buffer(text):
            raise PanicException("slice index starts at 1 but ends at 0")

    model.write("llama", tmp_path)
    monkeypatch.setattr(tokenizers, "Tokenizer", Tokenizer)
    with pytest.raises(hf.FormatError, match="describes no tokenizer: slice index"):
        model.read("llama", tmp_path)


def test_what_is_whole_loads(model, tmp_path):
    model.write("llama", tmp_path)
    model.read("llama", tmp_path)
    with watching(tmp_path) as watched:
        params = model.read("llama", tmp_path)
    assert watched.faults == []
    want = load_file(tmp_path / "model.safetensors")["model.norm.weight"]
    np.testing.assert_array_equal(params["norm"]["scale"], want)
