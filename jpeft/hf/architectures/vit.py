"""ViT."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ...models import ViT, ViTConfig
from .._fields import check, class_of, label_fields, label_names, typed
from .._names import Architecture, Row, linear, norm


HEADS = {"ViTModel": "bare", "ViTForImageClassification": "classification"}
FIELDS = [field.name for field in dataclasses.fields(ViTConfig) if field.name != "model_type"]
SIZES = ("image_size", "patch_size")
HARMLESS = ("attention_probs_dropout_prob", "hidden_dropout_prob", "encoder_stride", "pooler_type")


def build(
    fields: Mapping[str, Any],
    *,
    head: Literal["classification", "regression"] | None = None,
    num_labels: int | None = None,
    add_pooling_layer: bool | None = None,
    **options: Any,
) -> ViT:
    """The model of a `config.json`, or what is in it with another head. The arguments are those of encoders."""
    check(fields, known=[*FIELDS, "add_pooling_layer"], harmless=HARMLESS, only={"is_encoder_decoder": False})
    name = class_of(fields, "ViTModel")
    if head is None and name not in HEADS:
        raise ValueError(f"architectures={[name]!r} is not supported; supported: {', '.join(HEADS)}, or name a task")
    head = head or HEADS[name]
    given = {field: fields[field] for field in FIELDS if field in fields}
    pair = lambda size: tuple(size) if isinstance(size, list) else (size, size)
    config = typed(ViTConfig, given | {size: pair(given[size]) for size in SIZES if size in given})
    if head == "bare":
        if add_pooling_layer is None:
            add_pooling_layer = fields.get("add_pooling_layer", True)
        return ViT(config, add_pooling_layer=add_pooling_layer, **options)
    if head not in ("classification", "regression"):
        raise ValueError(f"{head!r} is no task of a ViT: 'classification' or 'regression'")
    count, labels = label_names(fields, 1 if head == "regression" else num_labels)
    return ViT(config, count, labels=labels, problem_type=fields.get("problem_type"), **options)


def rows(model: ViT) -> tuple[Row, ...]:
    """Of all parameters. Files have the names of transformers 4, and so has what transformers 5 saves."""
    prefix = "" if model.num_labels is None else "vit."
    embeddings, block, module = f"{prefix}embeddings", f"{prefix}encoder.layer.{{i}}", f"{prefix}layers.{{i}}"

    def layer(ours: str, theirs: str, today: str) -> tuple[Row, Row]:
        return linear(f"layers_{{i}}/{ours}", f"{block}.{theirs}", module=f"{module}.{today}")

    def layer_norm(ours: str, theirs: str) -> list[Row]:
        found = norm(f"layers_{{i}}/{ours}", f"{block}.{theirs}")
        return [dataclasses.replace(row, module=row.module.replace(block, module)) for row in found]

    return (
        Row("class_token", (f"{embeddings}.cls_token",)),
        Row("position", (f"{embeddings}.position_embeddings",)),
        *linear("patch", f"{embeddings}.patch_embeddings.projection", letters="oihw"),
        *layer("attention/query", "attention.attention.query", "attention.q_proj"),
        *layer("attention/key", "attention.attention.key", "attention.k_proj"),
        *layer("attention/value", "attention.attention.value", "attention.v_proj"),
        *layer("attention/out", "attention.output.dense", "attention.o_proj"),
        *layer("mlp/up", "intermediate.dense", "mlp.fc1"),
        *layer("mlp/down", "output.dense", "mlp.fc2"),
        *layer_norm("attention_norm", "layernorm_before"),
        *layer_norm("mlp_norm", "layernorm_after"),
        *norm("norm", f"{prefix}layernorm"),
        *linear("pooler", f"{prefix}pooler.dense"),
        *linear("head", "classifier"),
    )


def fields(model: ViT) -> dict[str, Any]:
    """The `config.json` of a model. A square is one number, as most programs that read it expect."""
    found = {name: x for name, x in dataclasses.asdict(model.config).items() if x is not None}
    found |= {name: found[name][0] for name in SIZES if len(set(found[name])) == 1}
    found |= {name: list(found[name]) for name in SIZES if not isinstance(found[name], int)}
    if model.num_labels is None:
        return found | {"architectures": ["ViTModel"], "add_pooling_layer": model.add_pooling_layer}
    labels = label_fields(model.num_labels, model.labels, model.problem_type)
    return found | {"architectures": ["ViTForImageClassification"]} | labels


def inputs(model: ViT) -> dict[str, jax.ShapeDtypeStruct]:
    """What the model is called with."""
    return {"pixel_values": jax.ShapeDtypeStruct((1, model.config.num_channels, *model.config.image_size), jnp.float32)}


ARCHITECTURES = {
    "vit": Architecture(
        build, rows, fields, prefix="vit.", ignored=r"(vit\.)?pooler\..*|classifier\..*", head="head/.*", inputs=inputs
    )
}
