"""BEFT."""

from ...additive._beft import BEFT
from .._modules import Module
from ._format import Config, Format, Shapes, Tensors, linear


BIAS = "beft_bias"


def shapes(m: Module, config: Config, tensors: Tensors) -> Shapes:
    return {BIAS: (1, m.outputs)}


def read(m: Module, config: Config, tensors: Tensors) -> list:
    return [BEFT(bias=tensors[BIAS][0])]


def write(m: Module, nodes: list) -> tuple[Tensors, Config]:
    (node,) = nodes
    linear(m, "BEFT")
    return {BIAS: (node.bias if node.scale == 1 else node.scale * node.bias)[None]}, {}


BEFT_ = Format(
    peft_type="BEFT",
    nodes=(BEFT,),
    shapes=shapes,
    read=read,
    write=write,
    ends=(BIAS,),
    fields={},
    unused=frozenset({"init_weights"}),
)
