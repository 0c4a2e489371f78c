"""What a step should take by arithmetic alone."""

import math
from typing import Any

from ..models._loss import tokens_at_a_time


def estimate(config: Any, arrays: int, trainable: int, kernels: dict[str, Any], mesh: dict[str, int],
             batch: int, length: int) -> int:  # fmt: skip
    r"""Bytes per chip of a train step whose layers are recomputed, $A + G + R + \max(L, H)$:

    - $A$ (`arrays`): base, adapters, optimizer and batch, as they are divided; $G$ (`trainable`): the gradients.
    - $R = n\,b\,s\,d \cdot 2$: the inputs of the $n$ layers, $b$ rows of $s$ tokens of width $d$ on a chip, bfloat16.
    - $L$: a layer going backward. Its scores, $3\,b\,(h / t)\,s^2 \cdot 4$ for their softmax, its gradient and theirs
      in float32, $h$ heads over $t$ tensor-parallel chips; the MLP's $4\,b\,s\,(f / t) \cdot 2$; and its largest
      kernel, gathered and decoded, twice in bfloat16.
    - $H = 2\,b\,c\,(v / t) \cdot 4$: logits of $c$ tokens at a time, and their gradient, $v$ words; and the output
      head, gathered.

    Args:
      config: a `jpeft.models.DecoderConfig`.
      kernels: the `jax.ShapeDtypeStruct` of every parameter of the base before it was quantized, by path.
      mesh: the sizes of its axes `data`, `fsdp` and `tensor`.
      batch: rows of a step, on all chips.
      length: their tokens.
    """
    tensor = mesh["tensor"]
    b = batch / (mesh["data"] * mesh["fsdp"])
    inputs = config.num_hidden_layers * b * length * config.hidden_size * 2
    scores = 3 * b * config.num_attention_heads / tensor * length**2 * 4
    mlp = 4 * b * length * config.intermediate_size / tensor * 2
    largest = max(math.prod(x.shape[1:]) for path, x in kernels.items() if path.startswith("layers/"))
    tokens = min(length, tokens_at_a_time(math.ceil(b), config.vocab_size))
    logits = 2 * b * tokens * config.vocab_size / tensor * 4
    head = config.vocab_size * config.hidden_size / tensor * 2
    return int(arrays + trainable + inputs + max(scores + mlp + 2 * 2 * largest / tensor, logits + head))
