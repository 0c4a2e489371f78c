"""`config.json` of decoders: what versions 4 and 5 of transformers write, what is refused, and what is written back."""

import dataclasses
import json
from pathlib import Path

import pytest

from jpeft.hf.architectures import ARCHITECTURES
from jpeft.models._rotary import Dynamic, Linear, Llama3, LongRope, Yarn


FIXTURES = Path(__file__).parents[1] / "fixtures" / "decoders"
NAMES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
V4 = {"torch_dtype": "bfloat16", "transformers_version": "4.40.2", "use_cache": True, "initializer_range": 0.02}
SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4,
         "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip


def build(fields, **options):
    return ARCHITECTURES[fields["model_type"]].build(fields, **options)


def config(model_type, **fields):
    return build(SIZES | V4 | {"model_type": model_type} | fields).config


def stored(name):
    return json.loads((FIXTURES / name / "config.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_what_was_read(name):
    fields = stored(name)
    model = build(fields)
    written = json.loads(json.dumps(ARCHITECTURES[fields["model_type"]].fields(model)))
    assert build(written).config == model.config
    ropes = [part.pop("rope_parameters", {}) for part in (written, fields)]
    assert ropes[0].items() >= ropes[1].items()  # defaults may come in addition
    assert written.items() <= fields.items()


@pytest.mark.parametrize("name", NAMES)
def test_every_field_is_asked_for(name):
    fields = stored(name) | {"alibi": True, "quantization_config": {"bits": 4}, "is_encoder_decoder": True}
    with pytest.raises(ValueError, match=r"is_encoder_decoder=True.*alibi=True.*quantization_config=\{'bits': 4\}"):
        build(fields)


@pytest.mark.parametrize(
    ("model_type", "fields", "match"),
    [
        ("llama", {"vocab_size": None, "hidden_size": None, "alibi": 1}, "alibi=1.*no vocab_size; no hidden_size"),
        ("llama", {"hidden_act": "swiglu"}, "hidden_act='swiglu' is not supported; supported: .*silu"),
        ("llama", {"rope_scaling": {"type": "su"}}, "rope_type='su'"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "without factor"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "finetuned": True}}, r"\['finetuned'\]=True"),
        ("llama", {"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "factor.*not with rope_type='default'"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "only the same for all layers"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"layer_types": ["full_attention"] * 4}, "layer_types.*not a known field"),
        ("qwen2", {"layer_types": ["linear_attention"] * 4}, "linear_attention"),
        ("qwen2", {"layer_types": ["full_attention"] * 3}, "3 entries"),
        ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [1]}, "decoder_sparse_step=2.*mlp_only_layers"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma3_text", {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
         r"rope_parameters\['sliding_attention'\]"),
        ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "scale_attn_weights": False}, "scale_attn_weights=False"),
        ("mixtral", {"output_router_logits": True}, "output_router_logits=True"),
        ("phi3", {"lm_head_bias": True}, "lm_head_bias=True"),
    ],
)  # fmt: skip
def test_refused_by_name(model_type, fields, match):
    with pytest.raises(ValueError, match=match):
        config(model_type, **fields)


def test_version_4_and_5_say_the_same():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    old = config("llama", rope_theta=5e5, rope_scaling=scaling | {"rope_type": "llama3"}, pretraining_tp=1)
    new = config("llama", rope_parameters=scaling | {"rope_type": "llama3", "rope_theta": 5e5})
    assert old == new
    assert new.rope_scaling == Llama3(**scaling)
    fields = stored("gemma3_text")
    ropes = fields.pop("rope_parameters")
    old = fields | {
        "rope_theta": ropes["full_attention"]["rope_theta"],
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "rope_local_base_freq": ropes["sliding_attention"]["rope_theta"],
    }
    assert build(old).config == build(stored("gemma3_text")).config
    fields = stored("qwen3_moe")
    assert build(fields | {"num_experts": fields.pop("num_local_experts")}).config == build(stored("qwen3_moe")).config


def test_scalings():
    of = lambda model_type="llama", longest=4096, **scaling: config(
        model_type, max_position_embeddings=longest, rope_scaling=scaling
    ).rope_scaling
    assert of(type="linear", factor=2.0) == Linear(2.0)
    assert of(type="dynamic", factor=2.0) == Dynamic(2.0, max_position_embeddings=4096)
    assert of(type="yarn", factor=4.0) == Yarn(4.0, original_max_position_embeddings=4096)
    assert of(rope_type="yarn", original_max_position_embeddings=1024) == Yarn(4.0, 1024)
    long = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    assert of("phi3", 16384, **long) == LongRope((1.0,) * 4, (2.0,) * 4, 4.0, original_max_position_embeddings=4096)


def test_kinds_of_layers():
    full, sliding = "full_attention", "sliding_attention"
    windows = lambda *args, **fields: [reach.window for reach in config(*args, **fields).reaches]
    assert windows("mistral") == [4096] * 4
    assert windows("mistral", sliding_window=None) == [None] * 4
    assert windows("qwen2", sliding_window=9) == [None] * 4
    assert windows("qwen2", sliding_window=9, use_sliding_window=True, max_window_layers=1) == [None, 9, 9, 9]
    assert windows("qwen3_moe", sliding_window=9, use_sliding_window=True) == [9] * 4
    assert windows("gemma2", sliding_window=9) == [9, None, 9, None]
    assert windows("gemma3_text", sliding_window=9, sliding_window_pattern=3) == [9, 9, None, 9]
    assert windows("gemma3_text", sliding_window=9, layer_types=[full, sliding] * 2) == [None, 9, None, 9]
    assert [reach.theta for reach in config("gemma3_text", sliding_window_pattern=2).reaches] == [1e4, 1e6] * 2
    assert [reach.theta for reach in config("smollm3").reaches] == [2e6, 2e6, 2e6, None]
    assert {reach.theta for reach in build(stored("gpt2")).config.reaches} == {None}


def test_defaults_are_those_of_transformers():
    assert config("gemma", hidden_act="gelu", hidden_activation=None).hidden_act == "gelu_pytorch_tanh"
    assert config("gemma").width == 256
    assert config("gemma").tie_word_embeddings
    assert config("llama", num_key_value_heads=None).num_key_value_heads == 2
    gpt2 = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_ctx": 1024}
    assert build(gpt2).config.intermediate_size == 64
    assert config("llama", eos_token_id=[3, 4]).eos_token_id == (3, 4)


def test_fused_on_request():
    fields = stored("llama")
    fused = build(fields, fused=True).config
    assert dataclasses.replace(fused, fused=False) == build(fields).config
    with pytest.raises(ValueError, match="phi3 has fused matrices"):
        build(stored("phi3"), fused=False)
