"""VeRA. Its projections must be in the file: without them only torch's random generator knows them."""

from ...reparam._vera import VeRA
from .._modules import Module
from ._format import Config, Format, Shapes, Tensors, linear, positive


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


def check(config: Config) -> list[str]:
    faults = positive(config, "r")
    if not config["save_projection"]:
        faults.append(
            "save_projection = False: the projections are not in the file, and only torch's random generator can make "
            "them again. Load the adapter with PEFT, set `save_projection=True` in its config, and save it"
        )
    return faults


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
    shared={"vera_A": "project_a", "vera_B": "project_b"},
    check=check,
)
