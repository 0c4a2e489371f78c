"""HiRA."""

from ...reparam._hira import HiRA
from .._modules import Module
from ._format import Config, Format, Shapes, Tensors, inward, positive


A, B = "hira_A", "hira_B"
TABLE_A, TABLE_B = "hira_embedding_A", "hira_embedding_B"


def _names(m: Module) -> tuple[str, str]:
    return (TABLE_A, TABLE_B) if m.is_table else (A, B)


def shapes(m: Module, config: Config, tensors: Tensors) -> Shapes:
    a, b = _names(m)
    return {a: (config["r"], m.inputs), b: (m.outputs, config["r"])}


def read(m: Module, config: Config, tensors: Tensors) -> list:
    a, b = _names(m)
    return [HiRA(a=inward(tensors[a]), b=inward(tensors[b]))]


def write(m: Module, nodes: list) -> tuple[Tensors, Config]:
    (node,), (a, b) = nodes, _names(m)
    if m.window or m.experts:
        raise ValueError("PEFT's HiRA of convolutions is another, and it has none for experts")
    return {a: node.a.T, b: node.b.T}, {"r": node.a.shape[-1]}


HIRA = Format(
    peft_type="HIRA",
    nodes=(HiRA,),
    shapes=shapes,
    read=read,
    write=write,
    ends=(A, B, TABLE_A, TABLE_B),
    fields={"r": 32, "rank_pattern": {}},
    unused=frozenset({"hira_dropout", "init_weights"}),
    patterns={"r": "rank_pattern"},
    check=lambda config: positive(config, "r"),
)
