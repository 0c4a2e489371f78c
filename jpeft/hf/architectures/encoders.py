"""BERT, RoBERTa, XLM-RoBERTa and DistilBERT, with the heads that transformers has for them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn

from ...models import Classifier, Embedder, Encoder, EncoderConfig
from .._fields import check, class_of, label_fields, label_names, typed
from .._names import Architecture, linear
from ._encoder_rows import Rows, bert_rows, distilbert_rows


@dataclasses.dataclass(frozen=True)
class Brand:
    """What tells one encoder from another, on their side.

    **Fields:**

    - `model_type`.
    - `classes`: what the names of its classes begin with.
    - `prefix`: what the names of tensors begin with in models that have a head.
    - `rows`: of the encoder, of what our and their names begin with.
    - `pooler`, `head`: the modules of the head for classification.
    - `names`: their names of the config's fields, where they are others.
    - `fixed`: fields of our config that theirs does not have.
    - `defaults`: of their fields.
    - `harmless`: fields that change nothing, as `check` takes them.
    - `bare_pooler`: whether the model without a head has a pooler.
    """

    model_type: str
    classes: str
    prefix: str
    rows: Callable[[str, str], Rows]
    pooler: str
    head: str
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    harmless: tuple[str, ...] = ()
    bare_pooler: bool = True

    @property
    def fields(self) -> dict[str, str]:
        """Our fields of the config -> theirs."""
        ours = [field.name for field in dataclasses.fields(EncoderConfig)]
        return {name: self.names.get(name, name) for name in ours if name not in self.fixed and name != "model_type"}

    def config(self, fields: Mapping[str, Any]) -> EncoderConfig:
        """That of a `config.json`."""
        check(fields, known=[*self.fields.values(), "add_pooling_layer"], harmless=self.harmless, only=ONLY)
        given = {**self.defaults, **fields}
        read = {ours: given[theirs] for ours, theirs in self.fields.items() if theirs in given}
        return typed(EncoderConfig, {"model_type": self.model_type, **self.fixed, **read})


def build(
    brand: Brand,
    fields: Mapping[str, Any],
    *,
    head: Literal["classification", "regression", "tokens", "embedding"] | None = None,
    num_labels: int | None = None,
    add_pooling_layer: bool | None = None,
    **options: Any,
) -> nn.Module:
    """The model of a `config.json`, or the encoder in it with another head.

    **Arguments:**

    - `head`: left out, that of the class that the file names. The bare encoder is that of a masked language model.
    - `num_labels`: left out, that of the file.
    - `add_pooling_layer`: whether a bare model has a pooler; left out, as the file says, or its class in transformers.
    - `options`: of the module; an `Embedder` has `pooling` and `normalize`.
    """
    config, name = brand.config(fields), class_of(fields, f"{brand.classes}Model")
    if head is None and name not in (known := {f"{brand.classes}{end}": end for end in HEADS}):
        raise ValueError(f"architectures={[name]!r} is not supported; supported: {', '.join(known)}, or name a task")
    head = head or HEADS[name.removeprefix(brand.classes)]
    if head == "embedding":
        return Embedder(config, **options)
    if head == "bare":
        if add_pooling_layer is None:
            add_pooling_layer = fields.get("add_pooling_layer", brand.bare_pooler and name.endswith("Model"))
        return Encoder(config, add_pooling_layer=add_pooling_layer, **options)
    if head not in ("classification", "regression", "tokens"):
        raise ValueError(f"{head!r} is no task of encoders: 'classification', 'regression', 'tokens' or 'embedding'")
    count, labels = label_names(fields, 1 if head == "regression" else num_labels)
    return Classifier(
        config, count, None if head == "tokens" else "cls",
        labels=labels, problem_type=fields.get("problem_type"), **options,
    )  # fmt: skip


def rows(brand: Brand, model: nn.Module) -> Rows:
    """Of the parameters of an encoder and its head."""
    if isinstance(model, Encoder):
        return brand.rows("", "") + linear("pooler", "pooler.dense")
    if isinstance(model, Embedder):
        return brand.rows("encoder/", "")
    encoder = brand.rows("encoder/", f"{brand.prefix}.")
    if model.pooling is None:
        return encoder + linear("head", "classifier")
    return encoder + linear("pooler", brand.pooler) + linear("head", brand.head)


def fields(brand: Brand, model: nn.Module) -> dict[str, Any]:
    """The `config.json` of an encoder and its head.

    **Raises** `ValueError` for a classifier of means, which transformers does not have.
    """
    config = dataclasses.asdict(model.config)
    found = {theirs: config[ours] for ours, theirs in brand.fields.items()} | {"model_type": brand.model_type}
    if not isinstance(model, Classifier):
        pooled = isinstance(model, Encoder) and model.add_pooling_layer
        # A field of ours: transformers would make a pooler, which we do not miss.
        return found | {"architectures": [f"{brand.classes}Model"], "add_pooling_layer": pooled}
    if model.pooling == "mean":
        raise ValueError('transformers has no classifier that pools by the mean: use `Classifier(pooling="cls")`.')
    end = "ForTokenClassification" if model.pooling is None else "ForSequenceClassification"
    labels = label_fields(model.num_labels, model.labels, model.problem_type)
    return found | {"architectures": [f"{brand.classes}{end}"]} | labels


# The ends of classes' names -> the task.
HEADS = {
    "Model": "bare",
    "ForMaskedLM": "bare",
    "ForPreTraining": "bare",
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "tokens",
}
ONLY = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
}
BERT = Brand(
    "bert", "Bert", "bert", bert_rows, "bert.pooler.dense", "classifier",
    fixed={"padding_idx": None, "pooler_act": "tanh"},
    harmless=(
        "attention_probs_dropout_prob", "hidden_dropout_prob", "classifier_dropout", "tie_word_embeddings",
        "directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers",
        "pooler_size_per_head", "pooler_type",
    ),
)  # fmt: skip
ROBERTA = dataclasses.replace(
    BERT, model_type="roberta", classes="Roberta", prefix="roberta", pooler="classifier.dense",
    head="classifier.out_proj", names={"padding_idx": "pad_token_id"}, fixed={"pooler_act": "tanh"},
    defaults={"pad_token_id": 1, "vocab_size": 50265},
)  # fmt: skip
XLM_ROBERTA = dataclasses.replace(
    ROBERTA, model_type="xlm-roberta", classes="XLMRoberta", defaults={"pad_token_id": 1, "vocab_size": 30522}
)
DISTILBERT = Brand(
    "distilbert", "DistilBert", "distilbert", distilbert_rows, "pre_classifier", "classifier",
    names={
        "hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim", "hidden_act": "activation",
    },
    fixed={"type_vocab_size": 0, "layer_norm_eps": 1e-12, "padding_idx": None, "pooler_act": "relu"},
    defaults={"n_layers": 6},
    harmless=(
        "dropout", "attention_dropout", "qa_dropout", "seq_classif_dropout", "tie_word_embeddings", "tie_weights_",
        "sinusoidal_pos_embds",  # how the table of positions was initialized; it is in the file
    ),
    bare_pooler=False,
)  # fmt: skip


def _architecture(brand: Brand) -> Architecture:
    return Architecture(
        build=lambda given, **options: build(brand, given, **options),
        rows=lambda model: rows(brand, model),
        fields=lambda model: fields(brand, model),
        prefix=f"{brand.prefix}.",
        # Buffers, and the heads that a model does without.
        ignored=rf"({brand.prefix}\.)?(embeddings\.(position_ids|token_type_ids)|pooler\..*)|"
        r"(cls|lm_head|vocab_transform|vocab_layer_norm|vocab_projector|classifier|pre_classifier|qa_outputs)\..*",
        aliases={r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"},
        head=r"(pooler|head)/.*",
    )


ARCHITECTURES = {brand.model_type: _architecture(brand) for brand in (BERT, ROBERTA, XLM_ROBERTA, DISTILBERT)}
