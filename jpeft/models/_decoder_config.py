"""What makes a decoder a Llama, a Gemma or a GPT-2."""

import dataclasses
from typing import Literal

from ._layers import ACTIVATIONS
from ._rotary import Reach, Scaling


FULL, SLIDING = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The numbers and features of a decoder, under Hugging Face's names where it has them; the defaults are Llama's.

    Raises a ValueError for heads that do not divide `hidden_size`, or groups that do not divide heads; for rotations of
    an odd width; for activations and kinds of layers that are not known, and kinds for another number of layers.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    model_type: str = "llama"
    head_dim: int | None = None  # hidden_size / num_attention_heads
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False

    # Positions
    max_position_embeddings: int = 2048
    learned_positions: bool = False  # a table instead of rotations
    rope_theta: float = 10000.0
    rope_scaling: Scaling | None = None
    partial_rotary_factor: float = 1.0  # of a head's entries, the share that rotates
    rope_local_base_freq: float | None = None  # rope_theta of sliding layers, which then are not scaled
    no_rope_layers: tuple[int, ...] | None = None  # 0 for layers that do not rotate, 1 for others
    layer_types: tuple[str, ...] | None = None  # full_attention or sliding_attention; all slide if there is a window
    sliding_window: int | None = None

    # Norms
    norm: Literal["rms", "layer"] = "rms"
    rms_norm_eps: float = 1e-6
    norm_offset: float = 0.0  # what is added to the scale
    post_norms: bool = False  # norms also of what attention and MLP return
    qk_norm: bool = False

    # Matrices
    attention_bias: bool = False  # of query, key and value
    attention_out_bias: bool | None = None  # attention_bias
    mlp_bias: bool = False
    gated: bool = True
    fused: bool = False  # query, key and value are one matrix, and so are gate and up

    # Scales
    query_pre_attn_scalar: float | None = None  # scores are divided by its root; head_dim
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    scale_embeddings: bool = False  # by the root of hidden_size

    # A mixture of experts, where there is more than none
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int | None = None  # intermediate_size
    norm_topk_prob: bool = True

    # Tokens, for those who generate text
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        faults = []
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            faults.append(f"hidden_size={self.hidden_size} is no multiple of {self.num_attention_heads=}")
        elif not self.learned_positions and self.rotary_width % 2:
            faults.append(f"rotations pair entries: {self.rotary_width} of hidden_size={self.hidden_size} is odd")
        if self.num_attention_heads % self.num_key_value_heads:
            faults.append(f"{self.num_attention_heads=} is no multiple of {self.num_key_value_heads=}")
        if self.hidden_act not in ACTIVATIONS:
            faults.append(f"hidden_act={self.hidden_act!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
        if unknown := set(self.layer_types or ()) - {FULL, SLIDING}:
            faults.append(f"layer_types={sorted(unknown)} are not supported; supported: {FULL}, {SLIDING}")
        if SLIDING in (self.layer_types or ()) and self.sliding_window is None:
            faults.append(f"layer_types has {SLIDING}, and there is no sliding_window")
        for name in ("layer_types", "no_rope_layers"):
            if (value := getattr(self, name)) is not None and len(value) != self.num_hidden_layers:
                faults.append(f"{name} has {len(value)} entries, {self.num_hidden_layers=}")
        if self.num_experts_per_tok > self.num_experts:
            faults.append(f"{self.num_experts_per_tok=} is more than {self.num_experts=}")
        if faults:
            raise ValueError("; ".join(faults))

    @property
    def width(self) -> int:
        """Of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_width(self) -> int:
        """Of the part of a head that rotates."""
        return int(self.width * self.partial_rotary_factor)

    @property
    def reaches(self) -> list[Reach]:
        """Of every layer."""
        kinds = self.layer_types or [FULL if self.sliding_window is None else SLIDING] * self.num_hidden_layers
        turns = self.no_rope_layers or [not self.learned_positions] * self.num_hidden_layers
        return [self._reach(kind == SLIDING, bool(turn)) for kind, turn in zip(kinds, turns, strict=True)]

    def _reach(self, slides: bool, turns: bool) -> Reach:
        window = self.sliding_window if slides else None
        if not turns:
            return Reach(window, None, None)
        if slides and self.rope_local_base_freq is not None:
            return Reach(window, self.rope_local_base_freq, None)
        return Reach(window, self.rope_theta, self.rope_scaling)
