"""What the command trains for."""

import abc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import flax.linen as nn
import jax

from jpeft import Sites
from jpeft.cli._arguments import Arguments
from jpeft.cli._batches import Batches
from jpeft.cli._errors import UserError
from jpeft.cli._run import Row


if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Task(abc.ABC):
    """A model, rows to train it on and to evaluate it on, a loss, and what tells how good it is.

    **Fields:**

    - `kind`: by which methods know their learning rates.
    - `defaults`: of options that say nothing by themselves; `options`: those that no other task has.
    - `metric`: of the evaluation's metrics the one that tells most, how it is `formatted`, and in what `unit` the work
      is counted.
    - `compared`: metrics of the run's first row that it is to be compared with, and what they are.
    - `source`: the checkpoint's directory.
    - `params`: those of `model` before any method, `quantized` or not yet.
    - `within`: the path of the module that methods are to change; `""` for the model itself.
    - `sites`: what `jpeft.sites` tells of the model.
    """

    kind: ClassVar[str]
    defaults: ClassVar[Mapping[str, Any]]
    options: ClassVar[tuple[str, ...]]
    metric: ClassVar[str]
    formatted: ClassVar[str]
    unit: ClassVar[str]
    compared: ClassVar[Mapping[str, str]]

    source: Path
    model: nn.Module
    params: Any
    quantized: bool
    within: str
    sites: Sites
    train: Batches
    evaluation: Batches

    @abc.abstractmethod
    def __init__(self, arguments: Arguments):
        """Read the data and the model. Raises a UserError for what is wrong with them."""

    @abc.abstractmethod
    def describe(self) -> str:
        """The data, in a line."""

    @abc.abstractmethod
    def fingerprint(self) -> Row:
        """What tells these data from others."""

    @abc.abstractmethod
    def head(self) -> Callable[..., Any]:
        """The transform of what trains whatever the method is."""

    @abc.abstractmethod
    def start(self, arguments: Arguments) -> tuple[Any, Row]:
        """The parameters to start from, and the run's first row of metrics."""

    @abc.abstractmethod
    def loss(self, params: Any, batch: Any) -> jax.Array:
        """The loss to train on, in sum over all that `batch.weights` counts."""

    @abc.abstractmethod
    def scores(self, params: Any, batch: Any) -> dict[str, jax.Array]:
        """What is evaluated, in sum over all that `batch.weights` counts."""

    @abc.abstractmethod
    def metrics(self, means: dict[str, float]) -> Row:
        """The row of metrics, `evaluation_loss` and `metric` among them, of the means of `scores`."""

    @abc.abstractmethod
    def amount(self, batch: Any) -> int:
        """How many of its `unit` a batch is."""

    @abc.abstractmethod
    def export(self, directory: Path, params: Any, arguments: Arguments) -> None:
        """Write the trained parameters in other forms than that of `jpeft.save`."""


def check_tokenizer(tokenizer: "Tokenizer | None", source: Path, vocabulary: int) -> None:
    """Raises a UserError where there is none, or one with more tokens than the model."""
    if tokenizer is None:
        raise UserError(f"{source} has no tokenizer.json")
    if (tokens := tokenizer.get_vocab_size()) > vocabulary:
        raise UserError(f"{source}: the tokenizer has {tokens} tokens, the model {vocabulary}")
