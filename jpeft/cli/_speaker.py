"""What `jpeft generate` and `jpeft chat` have in common: a model that continues a text."""

import dataclasses
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jpeft
from jpeft import hf
from jpeft.cli._arguments import option
from jpeft.cli._base import Base, is_saved
from jpeft.cli._errors import UserError, check_choice, one_line
from jpeft.cli._methods import BASES, quantizer
from jpeft.cli._task import check_tokenizer
from jpeft.generation._request import faults_of_sampling
from jpeft.generation._sampling import Sampling
from jpeft.hf._chat import stop_tokens
from jpeft.hf._load import describe, model_sites, parameter_shapes
from jpeft.hf._repository import locate


DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The arguments of both commands."""

    model: str
    """Hugging Face directory of a causal model or of a T5, with a tokenizer.json; or the name of a repository."""

    adapter: tuple[Path, ...] = ()
    """Adapters, each put on those before: a run directory of `jpeft finetune`, what `jpeft.save` wrote, or a directory
    for PEFT. Of the first two kinds there may be one, which comes first."""

    base: str | None = None
    """How the model's kernels are kept: float, int8, int4 or nf4. By default as the adapter was trained, or float."""

    dtype: str | None = None
    """float32, bfloat16 or float16. By default as the adapter was trained, or that of the files."""

    max_new_tokens: int = 256
    """How many tokens an answer has at most."""

    temperature: float = 0.0
    """How much is left to chance: scores are divided by it. With 0 the most probable token is taken."""

    top_k: int | None = None
    """Choose among so many of the most probable tokens."""

    top_p: float | None = None
    """Choose among the most probable tokens that together have this probability."""

    min_p: float | None = None
    """Choose among the tokens that have this share of the highest probability."""

    repetition_penalty: float | None = None
    """Above 1: tokens that were there already become less probable."""

    stop: tuple[str, ...] = ()
    """Strings that end an answer, and are not shown."""

    seed: int = 0
    """Of what is left to chance."""

    def sampling(self) -> dict[str, Any]:
        """What `jpeft.generate` is told of how to choose a token."""
        return {name: getattr(self, name) for name in Sampling._fields}

    def check(self) -> None:
        """Raises a UserError for a choice that there is not, numbers that make no sense, and adapters that are none."""
        faults = list(faults_of_sampling(**self.sampling()))
        if self.max_new_tokens < 1:
            faults.append(f"`max_new_tokens` is {self.max_new_tokens}: 1 or more")
        if not all(self.stop):
            faults.append("`stop` has an empty string, which every text has")
        if faults:
            raise UserError(re.sub(r"`(\w+)`", lambda m: option(m[1]), "; ".join(faults)))
        check_choice("base", self.base or "float", BASES)
        check_choice("dtype", self.dtype or DTYPES[0], DTYPES)
        for n, adapter in enumerate(self.adapter):
            if not is_saved(adapter) and not (adapter / "adapter_config.json").is_file():
                raise UserError(f"{adapter} is no adapter: it has neither an adapter_config.json nor a manifest.json")
            if n and is_saved(adapter):
                raise UserError(f"{adapter} was saved with the base that it was trained on: it can only come first")


class Speaker:
    """A model with its adapters, its tokenizer, and what ends its answers. `directory` is the checkpoint's."""

    def __init__(self, arguments: Arguments):
        """Raises a UserError for what cannot be loaded."""
        adapters = tuple(_inside(adapter) for adapter in arguments.adapter)
        self._arguments = arguments = dataclasses.replace(arguments, adapter=adapters)
        arguments.check()
        with one_line():
            self.directory = locate(arguments.model)
            self.model, self._params, self.tokenizer = _load(self.directory, arguments)
            check_tokenizer(self.tokenizer, self.directory, self.model.config.vocab_size)
            self.tokenizer.no_padding()
            self.tokenizer.no_truncation()
            self._stops = stop_tokens(self.directory, self.tokenizer)

    def answer(self, tokens: list[int], *, turn: int = 0, **options: Any) -> Iterator[str]:
        """The text that follows `tokens`, piece by piece. `options` are those of `jpeft.stream`.

        Raises a UserError for what the model cannot work with.
        """
        key = jax.random.fold_in(jax.random.key(self._arguments.seed), turn)
        given = {"tokenizer": self.tokenizer, "stop_tokens": self._stops, "key": key}
        given |= {"max_new_tokens": self._arguments.max_new_tokens, "stop_strings": self._arguments.stop}
        with one_line():
            options = given | self._arguments.sampling() | options
            for piece in jpeft.stream(self.model, self._params, np.array([tokens]), **options):
                yield piece.text[0]


def _inside(adapter: Path) -> Path:
    """The adapter of a run directory; any other directory itself."""
    return adapter / "adapter" if is_saved(adapter / "adapter") else adapter


def _load(directory: Path, arguments: Arguments) -> tuple[Any, Any, Any]:
    """The model, its parameters with the adapters, and the tokenizer."""
    saved = Base.of(arguments.adapter[0]) if arguments.adapter and is_saved(arguments.adapter[0]) else None
    options = {"scan": True} if saved and saved.scan else {}
    sites = _sites(directory, options)
    quantize = saved.quantizer(sites) if saved and not arguments.base else quantizer(arguments.base or "float", sites)
    dtype = arguments.dtype or (saved and saved.dtype)
    model, params, tokenizer = hf.load(directory, dtype=dtype, quantize=quantize, **options)
    for adapter in arguments.adapter:
        put = jpeft.restore if is_saved(adapter) else partial(hf.load_adapter, model=model)
        params = put(adapter, params)
    return model, params, tokenizer


def _sites(directory: Path, options: dict[str, Any]) -> jpeft.Sites:
    fields, architecture = describe(directory)
    model = architecture.build(fields, **options)
    if not hasattr(model, "init_cache"):
        raise ValueError(f"{directory} has a model of type {fields['model_type']}, which writes no text")
    return model_sites(architecture, model, parameter_shapes(architecture, model))
