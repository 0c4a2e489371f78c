"""T5, T5 1.1 and Flan-T5."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from ...models import T5, T5Config, T5Encoder
from .._fields import check, class_of, typed
from .._names import TOKEN_IDS, Architecture, Row, linear, norm, table


CLASSES = {
    "T5ForConditionalGeneration": T5,
    "T5WithLMHeadModel": T5,  # what it was called in the files of Google's first checkpoints
    "T5EncoderModel": T5Encoder,
}
FIELDS = [field.name for field in dataclasses.fields(T5Config) if field.name != "model_type"]
TIED = ("lm_head", "encoder.embed_tokens", "decoder.embed_tokens")
HARMLESS = (
    "dropout_rate", "classifier_dropout", "n_positions", "dense_act_fn", "is_gated_act", "is_encoder_decoder",
)  # fmt: skip


def build(
    fields: Mapping[str, Any], *, head: None = None, tie_word_embeddings: bool | None = None, **options: Any
) -> nn.Module:
    """The model of a `config.json`; there are no heads for tasks.

    Files of T5 1.1 say that the output is not the embedding's: `"tie_word_embeddings": false`, or, where transformers 5
    has written them, `"scale_decoder_outputs": false` alone. The option `tie_word_embeddings` goes before both.
    """
    if head is not None:
        raise ValueError(f"{head!r} is no task of a T5: it has no head but that of its decoder")
    check(fields, known=FIELDS, harmless=HARMLESS, only={"is_decoder": False})
    name = class_of(fields, "T5ForConditionalGeneration")
    if name not in CLASSES:
        raise ValueError(f"architectures={[name]!r} is not supported; supported: {', '.join(CLASSES)}")
    given = {field: fields[field] for field in FIELDS if fields.get(field) is not None}
    tied = given.get("tie_word_embeddings", True)
    scaled = given.setdefault("scale_decoder_outputs", tied)
    given["tie_word_embeddings"] = tied and scaled if tie_word_embeddings is None else tie_word_embeddings
    return CLASSES[name](typed(T5Config, given), **options)


def rows(model: nn.Module) -> tuple[Row, ...]:
    """Of all parameters of both stacks."""
    stack = lambda name, *attentions: _stack_rows(model.config, name, attentions)
    return (
        *table("shared", "shared"),
        *stack("encoder", ("attention", "SelfAttention")),
        *stack("decoder", ("attention", "SelfAttention"), ("cross_attention", "EncDecAttention")),
        *linear("lm_head", "lm_head"),
    )


def _stack_rows(config: T5Config, name: str, attentions: tuple[tuple[str, str], ...]) -> list[Row]:
    """Of the encoder or the decoder, whose attentions have these names of ours and theirs."""
    layer, block = f"{name}/layers_{{i}}", f"{name}.block.{{i}}.layer"
    found = [*norm(f"{name}/norm", f"{name}.final_layer_norm")]
    found += table(f"{name}/relative_attention_bias", f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias")
    for n, (ours, theirs) in enumerate(attentions):
        found += norm(f"{layer}/{ours}_norm", f"{block}.{n}.layer_norm")
        for projection in ("query", "key", "value", "out"):
            found += linear(f"{layer}/{ours}/{projection}", f"{block}.{n}.{theirs}.{projection[0]}")
    last = f"{block}.{len(attentions)}"
    matrices = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if config.gated else {"up": "wi", "down": "wo"}
    for ours, theirs in matrices.items():
        found += linear(f"{layer}/mlp/{ours}", f"{last}.DenseReluDense.{theirs}")
    return [*found, *norm(f"{layer}/mlp_norm", f"{last}.layer_norm")]


def fields(model: nn.Module) -> dict[str, Any]:
    """The `config.json` of a model. Transformers 4 scales the decoder's output where the embedding is tied."""
    encoder = isinstance(model, T5Encoder)
    return dataclasses.asdict(model.config) | {
        "architectures": ["T5EncoderModel" if encoder else "T5ForConditionalGeneration"],
        "num_decoder_layers": model.config.num_decoder_layers or model.config.num_layers,
        "is_encoder_decoder": not encoder,
    }


def inputs(model: nn.Module) -> dict[str, jax.ShapeDtypeStruct]:
    """What the model is called with."""
    return {"input_ids": TOKEN_IDS} | ({} if isinstance(model, T5Encoder) else {"decoder_input_ids": TOKEN_IDS})


ARCHITECTURES = {
    "t5": Architecture(
        build,
        rows,
        fields,
        # Of a cross-attention that never had one, in the files of Google's first checkpoints.
        ignored=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
        tied=dict.fromkeys((f"{name}.weight" for name in TIED), "shared.weight"),
        inputs=inputs,
    )
}
