"""Llama, Mistral, Qwen, Gemma, Phi-3, SmolLM, GPT-2 and Mixtral, as causal language models."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

from ...models import Decoder, DecoderConfig
from .._fields import check, typed
from .._names import Architecture, Row, linear, norm, table
from . import _rope
from ._brands import BRANDS, HARMLESS, ONLY, RENAMED, TOKEN_FIELDS, Brand


def build(brand: Brand, fields: Mapping[str, Any], *, fused: bool | None = None, **options: Any) -> Decoder:
    """The model of a `config.json`.

    **Arguments:**

    - `fused`: query, key and value as one matrix, and gate and up as another; left out, as the checkpoint has them.
    - `options`: `scan`, `remat`, `dtype` and `param_dtype` of `Decoder`.

    **Raises** `ValueError` for a fused checkpoint that is not to be fused.
    """
    config = read(brand, fields)
    if fused is False and config.fused:
        raise ValueError(f"{brand.model_type} has fused matrices in its checkpoints: fused=False is not supported")
    return Decoder(dataclasses.replace(config, fused=config.fused if fused is None else fused), **options)


def read(brand: Brand, fields: Mapping[str, Any]) -> DecoderConfig:
    """The config that a `config.json` describes.

    **Raises** `ValueError` with every field that is missing, not understood, or of a value the model does not have.
    """
    # A null is no more than a field left out, unless another value is the default.
    known = {RENAMED.get(name, name): value for name, value in fields.items()}
    given = {name: value for name, value in known.items() if value is not None or name in brand.defaults}
    own = {**brand.defaults, **brand.passing, **given}
    rope, faults = ({}, []) if brand.theta is None else _rope.read(own, brand.theta, brand.local_theta)
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and not brand.partial:
        faults.append(f"partial_rotary_factor={rope['partial_rotary_factor']!r} (only 1.0)")
    faults += [f"no {name}" for name in brand.needed if own.get(name) is None]
    known = {*brand.needed, *brand.defaults, *brand.passing, *TOKEN_FIELDS, *(_rope.FIELDS if brand.theta else ())}
    check(given, known=known, harmless=HARMLESS + brand.harmless, only=ONLY | brand.only, faults=faults)
    stored = [name for name in (*brand.needed, *brand.defaults, *TOKEN_FIELDS) if name in own]
    ours = {brand.names.get(name, name): _frozen(own[name]) for name in stored}
    ours |= rope | brand.features | brand.derive(own)
    ours["num_key_value_heads"] = ours.get("num_key_value_heads") or ours["num_attention_heads"]
    return typed(DecoderConfig, {"model_type": brand.model_type, **ours})


def write(brand: Brand, model: Decoder) -> dict[str, Any]:
    """The `config.json` of a model, as transformers 5 has it."""
    config, names = model.config, (*brand.needed, *brand.defaults, *TOKEN_FIELDS)
    theirs = {name: _thawed(getattr(config, brand.names.get(name, name))) for name in names}
    if config.head_dim is None:
        theirs.pop("head_dim", None)  # some of their classes take null for a width
    theirs |= {"rope_parameters": _rope.write(config)} if brand.theta else {}
    return theirs | brand.restore(config) | {"model_type": brand.model_type, "architectures": [brand.architecture]}


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _thawed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def rows(brand: Brand, model: Decoder) -> tuple[Row, ...]:
    """Of all parameters that a decoder of Llama's names may have."""
    config, ours, theirs = model.config, "layers_{i}", "model.layers.{i}"
    attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
    norms = ("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    after_attention, before_mlp, after_mlp = norms if config.post_norms else ("", norms[0], "")
    separate = config.fused and not brand.features.get("fused")
    qkv = [f"{attention}.{name}" for name in (("q_proj", "k_proj", "v_proj") if separate else ("qkv_proj",))]
    gate_up = [f"{mlp}.{name}" for name in (("gate_proj", "up_proj") if separate else ("gate_up_proj",))]
    widths = [count * config.width for count in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
    sizes = tuple(widths) if separate else ()
    return (
        *table("embed", "model.embed_tokens"),
        *norm(f"{ours}/attention_norm", f"{theirs}.input_layernorm"),
        *linear(f"{ours}/attention/query", f"{attention}.q_proj"),
        *linear(f"{ours}/attention/key", f"{attention}.k_proj"),
        *linear(f"{ours}/attention/value", f"{attention}.v_proj"),
        *(dataclasses.replace(row, sizes=sizes) for row in linear(f"{ours}/attention/qkv", *qkv)),
        *norm(f"{ours}/attention/query_norm", f"{attention}.q_norm"),
        *norm(f"{ours}/attention/key_norm", f"{attention}.k_norm"),
        *linear(f"{ours}/attention/out", f"{attention}.o_proj"),
        *norm(f"{ours}/attention_post_norm", f"{theirs}.{after_attention}"),
        *norm(f"{ours}/mlp_norm", f"{theirs}.{before_mlp}"),
        *linear(f"{ours}/mlp/gate", f"{mlp}.gate_proj"),
        *linear(f"{ours}/mlp/up", f"{mlp}.up_proj"),
        *linear(f"{ours}/mlp/gate_up", *gate_up),
        *linear(f"{ours}/mlp/down", f"{mlp}.down_proj"),
        *experts(brand.model_type),
        *norm(f"{ours}/mlp_post_norm", f"{theirs}.{after_mlp}"),
        *norm("norm", "model.norm"),
        *([] if config.tie_word_embeddings else linear("lm_head", "lm_head")),
    )


def experts(model_type: str) -> tuple[Row, ...]:
    """Files have a matrix per expert, transformers' modules one array of all."""
    ours, block = "layers_{i}/moe", "model.layers.{i}"
    files, gate, up, down = "mlp", "gate_proj", "up_proj", "down_proj"
    if model_type == "mixtral":
        files, gate, up, down = "block_sparse_moe", "w1", "w3", "w2"
    of_expert = lambda *names: tuple(f"{block}.{files}.experts.{{e}}.{name}.weight" for name in names)
    return (
        Row(f"{ours}/router/kernel", (f"{block}.{files}.gate.weight",), "oi", f"{block}.mlp.gate.weight"),
        Row(f"{ours}/experts/gate_up", of_expert(gate, up), "oi", f"{block}.mlp.experts.gate_up_proj"),
        Row(f"{ours}/experts/down", of_expert(down), "oi", f"{block}.mlp.experts.down_proj"),
    )


def gpt2_rows(model: Decoder) -> tuple[Row, ...]:
    """Of a GPT-2, whose matrices lie as ours do."""
    ours, theirs = "layers_{i}", "transformer.h.{i}"
    return (
        *table("embed", "transformer.wte"),
        *table("position", "transformer.wpe"),
        *norm(f"{ours}/attention_norm", f"{theirs}.ln_1"),
        *linear(f"{ours}/attention/qkv", f"{theirs}.attn.c_attn", letters="io"),
        *linear(f"{ours}/attention/out", f"{theirs}.attn.c_proj", letters="io"),
        *norm(f"{ours}/mlp_norm", f"{theirs}.ln_2"),
        *linear(f"{ours}/mlp/up", f"{theirs}.mlp.c_fc", letters="io"),
        *linear(f"{ours}/mlp/down", f"{theirs}.mlp.c_proj", letters="io"),
        *norm("norm", "transformer.ln_f"),
        *([] if model.config.tie_word_embeddings else linear("lm_head", "lm_head")),
    )


def _architecture(brand: Brand) -> Architecture:
    old = brand.model_type == "gpt2"
    return Architecture(
        build=partial(build, brand),
        rows=gpt2_rows if old else partial(rows, brand),
        fields=partial(write, brand),
        prefix="transformer." if old else "model.",
        ignored=r".*\.h\.\d+\.attn\.(masked_)?bias" if old else r".*\.rotary_emb\.inv_freq",
        tied={"lm_head.weight": "transformer.wte.weight" if old else "model.embed_tokens.weight"},
    )


ARCHITECTURES = {brand.model_type: _architecture(brand) for brand in BRANDS}
