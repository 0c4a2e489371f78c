"""Adapters of mlx-lm: LoRA and DoRA with factors as ours are, and a scale instead of an alpha."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..reparam._dora import DoRA
from ..reparam._lora import LoRA
from ._adapter_config import is_number
from ._modules import Module
from ._tree import Tree
from .formats._format import Config, Format, Shapes, Tensors


WEIGHTS = "adapters.safetensors"
A, B, MAGNITUDE = "lora_a", "lora_b", "m"

# The names that its experts have, and those that files of transformers have for them.
EXPERTS = {"gate_proj": ("gate_proj", "w1"), "up_proj": ("up_proj", "w3"), "down_proj": ("down_proj", "w2")}


def is_mlx(config: Mapping[str, Any]) -> bool:
    """Whether an `adapter_config.json` is of mlx-lm: it has the arguments of its training."""
    return "peft_type" not in config and ("lora_parameters" in config or "fine_tune_type" in config)


def own_config(config: Mapping[str, Any]) -> tuple[Config, list[str]]:
    """The scale, and faults. What else there is tells how it was trained."""
    given = config.get("lora_parameters") or {}
    scale, dropout = (given.get("scale", 20.0), given.get("dropout", 0.0)) if isinstance(given, dict) else (None, None)
    kind = config.get("fine_tune_type", "lora")
    faults = [] if kind in ("lora", "dora", "full") else [f"fine_tune_type = {kind!r}: 'lora', 'dora' or 'full'"]
    if not (is_number(scale) and is_number(dropout) and 0 <= dropout < 1):
        faults.append(f"lora_parameters = {given!r}: scale and dropout must be numbers, the dropout from 0 to below 1")
    return {"scale": scale, "dropout": dropout, "kind": kind}, faults


def shapes(m: Module, config: Config, tensors: Tensors) -> Shapes:
    a = tensors.get(A)
    rank = a.shape[-1] if a is not None and a.ndim else 0
    return {A: (m.inputs, rank), B: (rank, m.outputs)} | ({MAGNITUDE: (m.outputs,)} if config["kind"] == "dora" else {})


def read(m: Module, config: Config, tensors: Tensors) -> list:
    factors = {"a": tensors[A], "b": tensors[B], "scale": float(config["scale"])}
    if config["kind"] == "dora":
        return [DoRA(**factors, magnitude=tensors[MAGNITUDE])]
    return [LoRA(**factors, dropout=float(config["dropout"]))]


def one_by_one(tensors: Mapping[str, np.ndarray], tree: Tree) -> dict[str, np.ndarray]:
    """The tensors with those of experts, `(experts, rank, in)` and `(experts, out, rank)`, as one for each."""
    found = {}
    for name, x in tensors.items():
        match = re.fullmatch(r"(.*)\.switch_mlp\.(gate_proj|up_proj|down_proj)\.(lora_[ab])", name)
        ends = EXPERTS[match[2]] if match and x.ndim == 3 else ()
        modules = [f"{match[1]}.experts.{{}}.{end}" for end in ends if match]
        module = next((n for n in modules if n.format(0) in tree.weights), None)
        own = {name: x} if module is None else {f"{module.format(e)}.{match[3]}": y.T for e, y in enumerate(x)}
        found |= own
    return found


MLX = Format(peft_type="mlx-lm", nodes=(LoRA, DoRA), fields={}, shapes=shapes, read=read, ends=(A, B, MAGNITUDE))
# Of "full" the parameters themselves are there.
FULL = Format(peft_type="mlx-lm", nodes=(), fields={})
