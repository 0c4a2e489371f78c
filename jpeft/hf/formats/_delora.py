"""DeLoRA. The norms of the base that it was made for are in the file."""

import numpy as np

from ...reparam._delora import DeLoRA
from .._modules import Module
from ._format import Config, Format, Shapes, Tensors, linear, positive


A, B, BOUND, NORMS = "delora_A", "delora_B", "delora_lambda", "delora_w_norm"


def shapes(m: Module, config: Config, tensors: Tensors) -> Shapes:
    r = config["r"]
    return {A: (r, m.inputs), B: (m.outputs, r), BOUND: (1,), NORMS: (m.inputs,)}


def read(m: Module, config: Config, tensors: Tensors) -> list:
    factors = {"a": tensors[A].T, "b": tensors[B].T, "norms": tensors[NORMS]}
    return [DeLoRA(**factors, bound=tensors[BOUND].reshape(()), dropout=config["module_dropout"])]


def write(m: Module, nodes: list) -> tuple[Tensors, Config]:
    (node,) = nodes
    linear(m, "DeLoRA")
    tensors = {A: node.a.T, B: node.b.T, BOUND: np.reshape(node.bound, 1), NORMS: node.norms}
    return tensors, {"r": node.a.shape[-1], "module_dropout": node.dropout}


DELORA = Format(
    peft_type="DELORA",
    nodes=(DeLoRA,),
    bias="delora_only",
    shapes=shapes,
    read=read,
    write=write,
    ends=(A, B, BOUND, NORMS),
    fields={"r": 8, "module_dropout": 0.0, "rank_pattern": {}},
    unused=frozenset({"delora_lambda", "lambda_pattern", "init_weights"}),  # of the start
    patterns={"r": "rank_pattern"},
    check=lambda config: positive(config, "r"),
)
