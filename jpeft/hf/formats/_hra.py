"""HRA."""

from ...reparam._hra import HRA
from .._modules import Module
from ._format import Config, Format, Shapes, Tensors, linear, positive


U = "hra_u"


def shapes(m: Module, config: Config, tensors: Tensors) -> Shapes:
    return {U: (m.inputs, config["r"])}


def read(m: Module, config: Config, tensors: Tensors) -> list:
    return [HRA(u=tensors[U], orthogonal=config["apply_GS"])]


def write(m: Module, nodes: list) -> tuple[Tensors, Config]:
    (node,) = nodes
    linear(m, "HRA")
    return {U: node.u}, {"r": node.u.shape[-1], "apply_GS": node.orthogonal}


HRA_ = Format(
    peft_type="HRA",
    nodes=(HRA,),
    bias="hra_only",
    shapes=shapes,
    read=read,
    write=write,
    ends=(U,),
    fields={"r": 8, "apply_GS": False, "rank_pattern": {}},
    unused=frozenset({"init_weights"}),
    patterns={"r": "rank_pattern"},
    check=lambda config: positive(config, "r"),
)
