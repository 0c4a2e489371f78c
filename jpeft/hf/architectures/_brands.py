"""What tells one decoder from another in `config.json`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ...models import DecoderConfig
from .._fields import Fields
from ._sliding import alternating, use_windows, windows, windows_everywhere, windows_without_rope


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Names in old files -> today's.
RENAMED = {"num_experts": "num_local_experts"}

# Training, and how text is generated.
HARMLESS = tuple(
    """
    attention_dropout attn_pdrop embd_pdrop resid_pdrop hidden_dropout router_aux_loss_coef router_jitter_noise
    pretraining_tp cache_implementation auto_map max_length min_length max_new_tokens do_sample num_beams temperature
    top_k top_p repetition_penalty is_decoder
    """.split()  # noqa: SIM905
)
ONLY = {
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "output_router_logits": False,
}


@dataclasses.dataclass(frozen=True)
class Brand:
    """A `model_type`.

    **Fields:**

    - `architecture`: its class with a head for language modelling.
    - `defaults`: of the fields that a file may leave out, under their names.
    - `needed`: the fields that it may not.
    - `passing`: fields, with their defaults, that `derive` reads and ours has not.
    - `names`: their names -> ours, where these differ.
    - `features`: ours that are not in the file.
    - `derive`: ours, from their fields.
    - `restore`: theirs that `derive` has read.
    - `theta`, `local_theta`: default base of rotations, and that of sliding layers, if they have their own.
    - `partial`: whether a part of each head may rotate alone.
    - `harmless`, `only`: more fields, as `check` takes them.
    """

    model_type: str
    architecture: str
    defaults: Fields
    needed: tuple[str, ...] = SIZES
    passing: Fields = dataclasses.field(default_factory=dict)
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    features: Fields = dataclasses.field(default_factory=dict)
    derive: Callable[[Fields], dict[str, Any]] = lambda fields: {}
    restore: Callable[[DecoderConfig], dict[str, Any]] = lambda config: {}
    theta: float | None = 10000.0
    local_theta: float | None = None
    partial: bool = False
    harmless: tuple[str, ...] = ()
    only: Fields = dataclasses.field(default_factory=dict)


def tanh_gelu(fields: Fields) -> dict[str, Any]:
    """Of the first Gemma, whose "gelu" is another; `hidden_activation` goes before."""
    name = fields["hidden_activation"] or fields["hidden_act"]
    return {"hidden_act": "gelu_pytorch_tanh" if name == "gelu" else name}


def wide(fields: Fields) -> dict[str, Any]:
    """Of GPT-2."""
    return {"intermediate_size": fields["n_inner"] or 4 * fields["n_embd"]}


def original_length(config: DecoderConfig) -> dict[str, Any]:
    """Of Phi-3, which has it outside of its scaling."""
    scaling = config.rope_scaling
    length = config.max_position_embeddings if scaling is None else scaling.original_max_position_embeddings
    return {"original_max_position_embeddings": length}


LLAMA = {"num_key_value_heads": None, "head_dim": None, "hidden_act": "silu", "rms_norm_eps": 1e-6,
         "max_position_embeddings": 2048, "tie_word_embeddings": False}  # fmt: skip
BIASES = {"attention_bias": False, "mlp_bias": False}
QWEN = LLAMA | {"max_position_embeddings": 32768, "sliding_window": 4096}
GEMMA = LLAMA | {"head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 8192,
                 "tie_word_embeddings": True, "attention_bias": False}  # fmt: skip
GEMMA2 = {("hidden_activation" if name == "hidden_act" else name): x for name, x in GEMMA.items()} | {
    "sliding_window": 4096, "layer_types": None, "query_pre_attn_scalar": 256}  # fmt: skip
SCALED = {"norm_offset": 1.0, "scale_embeddings": True}
CAUSAL = {"use_bidirectional_attention": False}

BRANDS = (
    Brand(
        "llama", "LlamaForCausalLM",
        LLAMA | BIASES,
        only={"rope_interleaved": False},
        harmless=("is_llama_config",),
    ),
    Brand(
        "mistral", "MistralForCausalLM",
        LLAMA | {"max_position_embeddings": 131072, "sliding_window": 4096},
    ),
    Brand(
        "qwen2", "Qwen2ForCausalLM",
        QWEN | {"layer_types": None},
        passing={"use_sliding_window": False, "max_window_layers": 28},
        features={"attention_bias": True, "attention_out_bias": False},
        derive=windows, restore=use_windows,
        only={"use_mrope": False},
    ),
    Brand(
        "qwen3", "Qwen3ForCausalLM",
        QWEN | {"layer_types": None, "head_dim": 128, "attention_bias": False},
        passing={"use_sliding_window": False, "max_window_layers": 28},
        features={"qk_norm": True},
        derive=windows, restore=use_windows,
    ),
    Brand(
        "qwen3_moe", "Qwen3MoeForCausalLM",
        QWEN | {"attention_bias": False, "num_local_experts": 128, "num_experts_per_tok": 8,
                "moe_intermediate_size": 768, "norm_topk_prob": False},
        passing={"use_sliding_window": False},
        names={"num_local_experts": "num_experts"},
        features={"qk_norm": True},
        derive=windows_everywhere, restore=use_windows,
        harmless=("max_window_layers",),
        only={"decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    Brand(
        "gemma", "GemmaForCausalLM",
        GEMMA,
        passing={"hidden_activation": None},
        features=SCALED,
        derive=tanh_gelu,
        only=CAUSAL,
    ),
    Brand(
        "gemma2", "Gemma2ForCausalLM",
        GEMMA2 | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        names={"hidden_activation": "hidden_act"},
        features=SCALED | {"post_norms": True},
        derive=alternating(2),
        harmless=("hidden_act", "sliding_window_size"),  # transformers reads others
        only=CAUSAL,
    ),
    Brand(
        "gemma3_text", "Gemma3ForCausalLM",
        GEMMA2 | {"max_position_embeddings": 131072, "attn_logit_softcapping": None, "final_logit_softcapping": None},
        passing={"sliding_window_pattern": None},
        names={"hidden_activation": "hidden_act"},
        features=SCALED | {"post_norms": True, "qk_norm": True},
        derive=alternating(6),
        theta=1e6, local_theta=1e4,
        harmless=("hidden_act",),
        only=CAUSAL,
    ),
    Brand(
        "phi3", "Phi3ForCausalLM",
        LLAMA | {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "sliding_window": None},
        passing={"original_max_position_embeddings": 4096},
        features={"fused": True},
        restore=original_length,
        partial=True,
        only={"attention_bias": False, "mlp_bias": False, "lm_head_bias": False, "full_attn_mod": 1,
              "interpolate_factor": 1},
    ),
    Brand(
        "smollm3", "SmolLM3ForCausalLM",
        LLAMA | BIASES | {"max_position_embeddings": 32768, "tie_word_embeddings": True, "sliding_window": None,
                          "no_rope_layers": None, "layer_types": None},
        passing={"use_sliding_window": False, "no_rope_layer_interval": 4},
        derive=windows_without_rope, restore=use_windows,
        theta=2e6,
        harmless=("max_window_layers",),
    ),
    Brand(
        "gpt2", "GPT2LMHeadModel",
        {"n_inner": None, "n_positions": 1024, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
         "tie_word_embeddings": True},
        needed=("vocab_size", "n_embd", "n_layer", "n_head"),
        names={"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
               "n_inner": "intermediate_size", "n_positions": "max_position_embeddings",
               "activation_function": "hidden_act", "layer_norm_epsilon": "rms_norm_eps"},
        features={"norm": "layer", "learned_positions": True, "gated": False, "fused": True,
                  "attention_bias": True, "mlp_bias": True},
        derive=wide,
        theta=None,
        harmless=("n_ctx", "reorder_and_upcast_attn", "summary_type", "summary_use_proj", "summary_activation",
                  "summary_first_dropout", "summary_proj_to_labels"),
        only={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    ),
    Brand(
        "mixtral", "MixtralForCausalLM",
        LLAMA | {"rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "sliding_window": None,
                 "num_local_experts": 8, "num_experts_per_tok": 2},
        names={"num_local_experts": "num_experts"},
        theta=1e6,
    ),
)  # fmt: skip
