"""A decoder learns to write."""

import hashlib
import math
from collections.abc import Callable
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

import jpeft
from jpeft import hf
from jpeft.cli._arguments import Arguments
from jpeft.cli._data import Example, held_out
from jpeft.cli._errors import UserError, one_line
from jpeft.cli._methods import METHODS, check_length, quantizer
from jpeft.cli._packing import Packed, Sequences
from jpeft.cli._run import Row
from jpeft.cli._samples import Reader, Samples
from jpeft.cli._task import Task
from jpeft.hf._load import describe, load_tokenizer, model_sites, parameter_shapes


class Causal(Task):
    """A causal model, and rows of texts, completions or conversations."""

    kind = "causal"
    defaults: ClassVar = {"max_length": 1024, "batch_size": 8}
    options = ("loss_on", "pack", "scan", "remat", "dtype", "export_peft")
    metric, formatted, unit = "perplexity", ",.3f", "tokens"
    compared: ClassVar = {}
    within = ""

    def __init__(self, arguments: Arguments):
        if arguments.data is None:
            raise UserError("a causal model needs rows to learn from: --data FILE")
        self.source, self._method = arguments.model, METHODS[arguments.method]
        self._packed = arguments.pack and not self._method.before
        scan = arguments.scan and self._method.scans
        how = {"scan": scan, "remat": None if arguments.remat == "none" else arguments.remat}
        with one_line():
            fields, architecture = describe(self.source)
            model = architecture.build(fields, **how)
            tokenizer = load_tokenizer(self.source)
            if tokenizer is None:
                raise UserError(f"{self.source} has no tokenizer.json")
            count_all = arguments.loss_on == "all"
            reader = Reader.of(self.source, tokenizer, model.config.vocab_size, count_all=count_all)
        check_length(arguments, model.config.max_position_embeddings)
        self._samples = _read(reader, arguments)
        sequences = partial(Sequences, max_length=arguments.max_length, packed=self._packed)
        self.train, self.evaluation = (sequences(samples.kept) for samples in self._samples)
        with one_line():
            self.sites = model_sites(architecture, model, parameter_shapes(architecture, model))
            self.quantized = not self._method.frees
            quantize = quantizer(arguments.base, self.sites) if self.quantized else None
            dtype = arguments.dtype and jnp.dtype(arguments.dtype)
            self.model, self.params, _ = hf.load(self.source, dtype=dtype, quantize=quantize, **how)

    def describe(self) -> str:
        train, evaluation = self._samples
        rows = f"{len(train.kept):,} samples of {self.train.tokens:,} tokens to train on, in {len(self.train):,} rows"
        cut = f"; {train.cut} are cut to --max-length" if train.cut else ""
        dropped = f", and {train.dropped} left out, as nothing counts in what is left" if train.dropped else ""
        return f"{rows}, {len(evaluation.kept):,} samples to evaluate on{cut}{dropped}"

    def fingerprint(self) -> Row:
        digest = hashlib.sha256()
        for samples in self._samples:
            for sample in samples.kept:
                digest.update(sample.tokens.tobytes() + sample.counted.tobytes())
        train, evaluation = self._samples
        sizes = {"samples": len(train.kept), "evaluation_samples": len(evaluation.kept)}
        return sizes | {"sha256": digest.hexdigest()}

    def head(self) -> Callable[..., Any]:
        return jpeft.chain()

    def start(self, arguments: Arguments) -> tuple[Any, Row]:
        return self.params, {}

    def loss(self, params: Any, batch: Packed) -> jax.Array:
        # An adapter that adds places to a sequence knows of masks, and not of segments.
        seen = "segment_ids" if self._packed else "attention_mask"
        given = {"input_ids": batch.input_ids, "labels": batch.labels, seen: batch.segment_ids}
        return jnp.sum(jpeft.apply(self.model, {"params": params}, **given))

    def scores(self, params: Any, batch: Packed) -> dict[str, jax.Array]:
        return {"loss": self.loss(params, batch)}

    def metrics(self, means: dict[str, float]) -> Row:
        return {"evaluation_loss": means["loss"], "perplexity": math.exp(min(means["loss"], 700.0))}

    def amount(self, batch: Packed) -> int:
        return int(np.count_nonzero(batch.segment_ids))

    def export(self, directory: Path, params: Any, arguments: Arguments) -> None:
        """As PEFT has it, where it has it."""
        if arguments.export_peft and self._method.peft:
            names = {"base_model_name_or_path": str(self.source), "task_type": "CAUSAL_LM"}
            hf.save_adapter(directory / "peft", params, model=self.model, overwrite=True, **names)


def _read(reader: Reader, arguments: Arguments) -> tuple[Samples, Samples]:
    """The samples to train on, and those to evaluate on; without a file of the latter a tenth of the former."""
    train = reader.read(arguments.data, arguments.max_length)
    if arguments.eval_data is not None:
        return train, reader.read(arguments.eval_data, arguments.max_length)
    held = held_out([Example("", "", sample.group) for sample in train.kept], fraction=0.1, salt="evaluation")
    if not held.any():
        raise UserError("too few rows to hold some out for evaluation; give more, or a file of them: --eval-data")
    part = lambda which: list(compress(train.kept, which))
    return train._replace(kept=part(~held)), Samples(part(held), 0, 0)
