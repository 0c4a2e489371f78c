"""SHiRA. The entries are pairs of an output and an input, in any order."""

import numpy as np

from ...selective._sparse import Sparse, entries
from .._modules import Module
from ._format import Config, Format, Shapes, Tensors, linear, positive


VALUES, INDICES = "shira_weight", "shira_indices"


def shapes(m: Module, config: Config, tensors: Tensors) -> Shapes:
    count = config["r"] * (m.inputs + m.outputs)
    return {VALUES: (count,), INDICES: (2, count)}


def read(m: Module, config: Config, tensors: Tensors) -> list:
    pairs, _ = tensors[INDICES], entries((m.inputs, m.outputs))  # raises for more than an index can count
    if not ((pairs >= 0) & (pairs < np.array([[m.outputs], [m.inputs]], np.int32))).all():
        raise ValueError(f"its entries are not all of a matrix of {m.outputs} outputs and {m.inputs} inputs")
    outputs, inputs = pairs.astype(np.int32)  # on Windows PEFT writes them as float32
    return [Sparse(values=tensors[VALUES], indices=inputs * np.int32(m.outputs) + outputs)]


def write(m: Module, nodes: list) -> tuple[Tensors, Config]:
    (node,) = nodes
    linear(m, "SHiRA")
    there = node.indices < m.inputs * m.outputs
    values, (inputs, outputs) = node.values[there], np.divmod(node.indices[there], m.outputs)
    r, rest = divmod(values.size, m.inputs + m.outputs)
    if rest or not r:
        raise ValueError(f"{values.size} entries train: PEFT has a multiple of {m.inputs + m.outputs} = in + out")
    return {VALUES: values, INDICES: np.stack([outputs, inputs]).astype(np.int32)}, {"r": r}


SHIRA = Format(
    peft_type="SHIRA",
    nodes=(Sparse,),
    shapes=shapes,
    read=read,
    write=write,
    ends=(VALUES, INDICES),
    integers=(INDICES,),
    fields={"r": 32},
    unused=frozenset({"mask_type", "random_seed", "init_weights"}),
    check=lambda config: positive(config, "r"),
)
