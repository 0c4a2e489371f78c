"""VeRA. Its projections must be in the file: without them only torch's random generator knows them."""

import numpy as np

from ...reparam._vera import VeRA
from .._modules import Module
from ._format import Config, Format, Shapes, Shared, Tensors, linear, positive, projected


B, D = "vera_lambda_b", "vera_lambda_d"


def shapes(m: Module, config: Config, tensors: Tensors) -> Shapes:
    return {B: (m.outputs,), D: (config["r"],)}


def read(m: Module, config: Config, tensors: Tensors) -> list:
    # The projections are shared: they come once the nodes are made.
    return [VeRA(project_a=None, project_b=None, d=tensors[D], b=tensors[B], features_in=m.inputs,
                 dropout=config["vera_dropout"])]  # fmt: skip


def write(m: Module, nodes: list) -> tuple[Tensors, Config]:
    (node,) = nodes
    linear(m, "VeRA", conv1d=True)
    fields = {"r": node.d.size, "vera_dropout": node.dropout, "save_projection": True}
    return {B: node.b, D: node.d}, fields


def shared(config: Config, modules: list[Module]) -> list[Shared]:
    a = config["r"], max(m.inputs for m in modules)
    b = max(m.outputs for m in modules), config["r"]
    new = lambda name, field, shape: Shared(name, field, modules, shape, np.transpose, np.transpose)
    return [new("vera_A", "project_a", a), new("vera_B", "project_b", b)]


VERA = Format(
    peft_type="VERA",
    nodes=(VeRA,),
    bias="vera_only",
    shapes=shapes,
    read=read,
    write=write,
    ends=(B, D),
    fields={"r": 256, "save_projection": True, "vera_dropout": 0.0},
    unused=frozenset({"projection_prng_key", "d_initial", "init_weights"}),
    shared=shared,
    check=lambda config: positive(config, "r") + projected(config),
)
