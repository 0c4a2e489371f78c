"""C3A."""

import numpy as np

from ...reparam._c3a import C3A
from .._modules import Module
from ._format import Config, Format, Shapes, Tensors, linear, positive


KERNEL = "c3a_kernel"


def shapes(m: Module, config: Config, tensors: Tensors) -> Shapes:
    block = config["block_size"]
    return {KERNEL: (m.outputs // block, m.inputs // block, block)}


def read(m: Module, config: Config, tensors: Tensors) -> list:
    if any(n % config["block_size"] for n in (m.inputs, m.outputs)):
        raise ValueError(f"blocks of {config['block_size']} do not divide {m.inputs} inputs and {m.outputs} outputs")
    return [C3A(c=np.swapaxes(tensors[KERNEL], 0, 1))]


def write(m: Module, nodes: list) -> tuple[Tensors, Config]:
    (node,) = nodes
    linear(m, "C3A")
    return {KERNEL: np.swapaxes(node.c, 0, 1)}, {"block_size": node.c.shape[-1]}


C3A_ = Format(
    peft_type="C3A",
    nodes=(C3A,),
    bias="c3a_only",
    shapes=shapes,
    read=read,
    write=write,
    ends=(KERNEL,),
    fields={"block_size": 256, "block_size_pattern": {}},
    unused=frozenset({"init_weights"}),
    patterns={"block_size": "block_size_pattern"},
    check=lambda config: positive(config, "block_size", patterns="block_size_pattern"),
)
