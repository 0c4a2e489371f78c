"""GraLoRA, alone and with a term of low rank for the whole kernel."""

from ...reparam._gralora import GraLoRA
from .._modules import Module
from ._format import Config, Format, Shapes, Tensors, linear, plain, positive


A, B = "gralora_A", "gralora_B"
WHOLE_A, WHOLE_B = "gralora_A_general.weight", "gralora_B_general.weight"


def shapes(m: Module, config: Config, tensors: Tensors) -> Shapes:
    r, k, hybrid = config["r"], config["gralora_k"], config["hybrid_r"]
    found: Shapes = {A: (k, m.inputs // k, r), B: (k, r, m.outputs // k)}
    return found | ({WHOLE_A: (hybrid, m.inputs), WHOLE_B: (m.outputs, hybrid)} if hybrid else {})


def read(m: Module, config: Config, tensors: Tensors) -> list:
    k, scale = config["gralora_k"], config["alpha"] / (config["r"] + config["hybrid_r"])
    if any(n % k for n in (m.inputs, m.outputs, config["r"])):
        raise ValueError(f"{k} blocks do not divide {m.inputs} inputs, {m.outputs} outputs and r = {config['r']}")
    whole = {"whole_a": tensors[WHOLE_A].T, "whole_b": tensors[WHOLE_B].T} if config["hybrid_r"] else {}
    return [GraLoRA(a=tensors[A], b=tensors[B], scale=scale, dropout=config["gralora_dropout"], **whole)]


def write(m: Module, nodes: list) -> tuple[Tensors, Config]:
    (node,) = nodes
    linear(m, "GraLoRA", conv1d=True)
    r, hybrid = node.a.shape[-1], 0 if node.whole_a is None else node.whole_a.shape[-1]
    fields = {"r": r, "hybrid_r": hybrid, "gralora_k": len(node.a), "alpha": plain(node.scale * (r + hybrid)),
              "gralora_dropout": node.dropout}  # fmt: skip
    whole = {WHOLE_A: node.whole_a.T, WHOLE_B: node.whole_b.T} if hybrid else {}
    return {A: node.a, B: node.b, **whole}, fields


def check(config: Config) -> list[str]:
    hybrid = config["hybrid_r"]
    faults = [f"hybrid_r = {hybrid}: it must not be negative"] if hybrid < 0 else []
    return faults + positive(config, "r", "gralora_k")


GRALORA = Format(
    peft_type="GRALORA",
    nodes=(GraLoRA,),
    bias="gralora_only",
    shapes=shapes,
    read=read,
    write=write,
    ends=(A, B, WHOLE_A, WHOLE_B),
    fields={"r": 32, "hybrid_r": 0, "gralora_k": 2, "alpha": 64.0, "gralora_dropout": 0.0},
    unused=frozenset({"init_weights"}),
    check=check,
)
