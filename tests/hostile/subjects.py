"""What strangers send: adapters, models and checkpoints, each with how it is read."""

import dataclasses
import functools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft import hf


HERE = Path(__file__).parents[1]
sys.path.append(str(HERE / "hf"))
import adapters  # noqa: E402


CHECKPOINTS = ("lora", "nf4", "shared")
MODELS = ("llama", "mixtral", "gpt2", "gemma3_text")
ENCODERS = ("bert_classification", "t5_gated", "vit_classification")


@dataclasses.dataclass(frozen=True)
class Subject:
    """One kind of directories.

    **Fields:**

    - `seeds`: names of those that are as they should be.
    - `write`: `(seed, directory) ->` its files.
    - `read`: `(seed, directory) ->` what is in them.
    - `errors`: that may be raised for what is not as it should be.
    """

    seeds: tuple[str, ...]
    write: Callable[[str, Path], None]
    read: Callable[[str, Path], Any]
    errors: tuple[type[Exception], ...]


def _copy(source: Path, directory: Path) -> None:
    shutil.copytree(source, directory, dirs_exist_ok=True)


@functools.cache
def base(name: str, scratch: Path) -> tuple[Any, Any]:
    """The model and the parameters that adapters named so are for."""
    return hf.load(adapters.write_base(scratch / name, name))[:2]


def adapter(scratch: Path) -> Subject:
    """Adapters of every type."""

    def read(seed, directory):
        model, params = base(seed.partition("-")[0], scratch)
        return hf.load_adapter(directory, params, model=model)

    write = lambda seed, directory: adapters.write_adapter(directory, seed) and None
    return Subject(tuple(adapters.READ), write, read, (hf.AdapterFormatError, FileNotFoundError))


def model(scratch: Path) -> Subject:
    """Models, whole and in several files, with a tokenizer and a chat template."""

    def write(seed, directory):
        name, _, sharded = seed.partition(" ")
        folder = "decoders" if name in MODELS else "encoders"
        directory.mkdir(parents=True, exist_ok=True)
        for file in ("config.json", "model.safetensors"):
            shutil.copy(HERE / "fixtures" / folder / name / file, directory)
        write_texts(directory)
        if sharded:
            divide(directory)

    def read(seed, directory):
        hf.load_chat_template(directory)
        _, params, tokenizer = hf.load(directory)
        hf.stop_tokens(directory, tokenizer) if tokenizer else None
        return params

    seeds = (*MODELS, *ENCODERS, "llama sharded")
    return Subject(seeds, write, read, (hf.FormatError, FileNotFoundError))


def write_texts(directory: Path) -> None:
    """A tokenizer, and what tells how the model is talked to."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    vocabulary = {"[UNK]": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "ab": 5}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b")], unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "_")])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    tokenizer.enable_truncation(64)
    tokenizer.enable_padding()
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (directory / "tokenizer_config.json").write_text(json.dumps({**special, "chat_template": template}))
    (directory / "special_tokens_map.json").write_text(json.dumps(special))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2]}))


def divide(directory: Path) -> None:
    """The tensors in two files with an index."""
    arrays = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(arrays)}
    for file in set(places.values()):
        save_file({name: x for name, x in arrays.items() if places[name] == file}, directory / file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def checkpoint(scratch: Path) -> Subject:
    """What `jpeft.save` writes."""
    base = {"dense": {"kernel": np.ones((64, 32), np.float32), "bias": np.zeros(32, np.float32)}}
    bases = {"lora": base, "nf4": jpeft.nf4(base), "shared": base}
    methods = {"lora": jpeft.lora(rank=2), "nf4": jpeft.lora(rank=2), "shared": jpeft.vera(rank=4)}

    @functools.cache
    def saved(seed):
        path = scratch / f"saved-{seed}"
        jpeft.save(path, methods[seed](bases[seed]), overwrite=True)
        return path

    return Subject(
        CHECKPOINTS,
        lambda seed, directory: _copy(saved(seed), directory),
        lambda seed, directory: jpeft.restore(directory, bases[seed]),
        (jpeft.CheckpointError, FileNotFoundError),
    )


SUBJECTS = {"adapter": adapter, "model": model, "checkpoint": checkpoint}


def wait(x: Any) -> None:
    """Until all arrays are there."""
    jax.block_until_ready(jax.tree.leaves(x))
