"""An encoder learns to classify texts."""

import hashlib
from collections.abc import Callable
from functools import partial
from itertools import compress
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jpeft
from jpeft import hf, models
from jpeft.cli._arguments import Arguments
from jpeft.cli._data import Batch, Texts, held_out, label_names, read_jsonl
from jpeft.cli._docstrings import docstrings
from jpeft.cli._errors import check_choice, one_line
from jpeft.cli._keywords import keywords
from jpeft.cli._methods import check_length
from jpeft.cli._probe import probe
from jpeft.cli._run import Row
from jpeft.cli._task import Task, check_tokenizer


TASKS = {"keywords": keywords, "docstrings": docstrings}


class Classification(Task):
    """The user's labelled texts, or those of a task of the standard library's, and an encoder with a new head."""

    kind = "classification"
    defaults: ClassVar = {"max_length": 64, "batch_size": 32}
    options = ("task", "label_smoothing")
    metric, formatted, unit = "accuracy", ".1%", "examples"
    compared: ClassVar = {
        "majority_accuracy": "majority class",
        "probe_accuracy": "linear probe on the frozen features",
    }
    quantized, within = False, "encoder"

    def __init__(self, arguments: Arguments):
        check_choice("task", arguments.task, TASKS)
        train = TASKS[arguments.task]() if arguments.data is None else read_jsonl(arguments.data)
        if arguments.eval_data is None:
            held = held_out(train, fraction=0.2, salt="evaluation")
            train, evaluation = list(compress(train, ~held)), list(compress(train, held))
        else:
            evaluation = read_jsonl(arguments.eval_data)
        self.labels = label_names(train, evaluation)
        self._examples = train, evaluation
        self._smoothing = arguments.label_smoothing
        with one_line():
            self.source = arguments.model or models.minilm_directory()
            self._embedder, encoder, tokenizer = hf.load(self.source, dtype=jnp.float32, task="embedding")
        config = self._embedder.config
        check_tokenizer(tokenizer, self.source, config.vocab_size)
        check_length(arguments, config.max_length)
        tokenized = partial(Texts, labels=self.labels, tokenizer=tokenizer, max_length=arguments.max_length)
        self.train, self.evaluation = tokenized(train), tokenized(evaluation)
        shape = config.hidden_size, len(self.labels)
        self.model = models.Classifier(config, len(self.labels))
        self.params = encoder | {"head": {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[1])}}
        batch = self.evaluation.batch([0], 1)
        self.sites = jpeft.sites(self.model, {"params": self.params}, batch.tokens, batch.mask)

    def describe(self) -> str:
        sizes = f"{len(self.train):,} texts to train on, {len(self.evaluation):,} to evaluate on"
        return f"{sizes}, {len(self.labels)} labels"

    def fingerprint(self) -> Row:
        sizes = {"texts": len(self.train), "evaluation_texts": len(self.evaluation)}
        digest = hashlib.sha256(repr(self._examples).encode()).hexdigest()
        return {"labels": self.labels, **sizes, "sha256": digest}

    def head(self) -> Callable[..., Any]:
        return jpeft.unfreeze(targets="head/.*")

    def start(self, arguments: Arguments) -> tuple[Any, Row]:
        """A linear probe as a head to start from (Kumar et al., https://arxiv.org/abs/2202.10054)."""
        encoder, size = {"encoder": self.params["encoder"]}, arguments.batch_size
        seen, unseen = (features(self._embedder, encoder, texts, size) for texts in (self.train, self.evaluation))
        tuning = held_out(self._examples[0], fraction=0.2, salt="tuning")
        linear, strength = probe(seen, self.train.labels, tuning, len(self.labels))
        majority = np.bincount(self.train.labels).argmax()
        head = {"kernel": jnp.asarray(linear.kernel), "bias": jnp.asarray(linear.bias)}
        return self.params | {"head": head}, {
            "majority_accuracy": float(np.mean(self.evaluation.labels == majority)),
            "probe_accuracy": linear.accuracy(unseen, self.evaluation.labels),
            "probe_strength": strength,
        }

    def loss(self, params: Any, batch: Batch) -> jax.Array:
        logits = self._logits(params, batch)
        wanted = optax.smooth_labels(jax.nn.one_hot(batch.labels, logits.shape[1]), self._smoothing)
        return optax.softmax_cross_entropy(logits, wanted) @ batch.weights

    def scores(self, params: Any, batch: Batch) -> dict[str, jax.Array]:
        logits = self._logits(params, batch)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        right = (jnp.argmax(logits, axis=1) == batch.labels).astype(jnp.float32)
        return {"accuracy": right @ batch.weights, "loss": losses @ batch.weights}

    def _logits(self, params: Any, batch: Batch) -> jax.Array:
        return jpeft.apply(self.model, {"params": params}, batch.tokens, batch.mask)

    def metrics(self, means: dict[str, float]) -> Row:
        return {"accuracy": means["accuracy"], "evaluation_loss": means["loss"]}

    def amount(self, batch: Batch) -> int:
        return len(batch.labels)

    def export(self, directory, params, arguments) -> None:
        """There is no other form."""


def features(model: models.Embedder, params: Any, texts: Texts, size: int) -> np.ndarray:
    """Features (texts, d): the mean of the encoder's outputs at every text's tokens."""
    embed = jax.jit(lambda params, batch: model.apply({"params": params}, batch.tokens, batch.mask))
    found = np.zeros((len(texts), model.config.hidden_size), np.float32)
    for rows, batch in texts.all_batches(size):
        found[rows] = embed(params, batch)[: len(rows)]
    return found
