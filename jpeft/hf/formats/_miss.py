"""MiSS; of its variants "mini", whose matrix is repeated along the outputs, too."""

from ...reparam._miss import MiSS
from .._modules import Module
from ._format import Config, Format, Shapes, Tensors, linear, positive


BLOCK = "miss_block"
MINI = "mini"


def shapes(m: Module, config: Config, tensors: Tensors) -> Shapes:
    return {BLOCK: (config["r"], config["mini_r"] if config.get("init_weights") == MINI else m.outputs)}


def read(m: Module, config: Config, tensors: Tensors) -> list:
    d = tensors[BLOCK]
    if m.outputs % d.shape[1]:
        raise ValueError(f"a width of {d.shape[1]} does not divide {m.outputs} outputs")
    return [MiSS(d=d, repeats=m.outputs // d.shape[1], dropout=config["miss_dropout"])]


def write(m: Module, nodes: list) -> tuple[Tensors, Config]:
    (node,) = nodes
    linear(m, "MiSS")
    fields = {"r": len(node.d), "miss_dropout": node.dropout, "init_weights": True}
    if node.repeats > 1:
        fields |= {"init_weights": MINI, "mini_r": node.d.shape[1]}
    return {BLOCK: node.d}, fields


def check(config: Config) -> list[str]:
    start = config.get("init_weights", True)
    faults = [] if start in (True, False, MINI) else [f"init_weights = {start!r}: a variant that is not understood"]
    return faults + positive(config, "r", "mini_r")


MISS = Format(
    peft_type="MISS",
    nodes=(MiSS,),
    bias="MiSS_only",
    shapes=shapes,
    read=read,
    write=write,
    ends=(BLOCK,),
    fields={"r": 64, "mini_r": 1, "miss_dropout": 0.0},
    unused=frozenset({"init_weights"}),
    check=check,
)
