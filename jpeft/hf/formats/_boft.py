"""BOFT of one factor: where its CUDA extension is missing, PEFT makes and reads one, whatever the config says."""

from ...reparam._boft import BOFT
from .._modules import Module
from ._format import Config, Format, Shapes, Tensors, linear


R, S = "boft_R", "boft_s"


def shapes(m: Module, config: Config, tensors: Tensors) -> Shapes:
    size, number = config["boft_block_size"], config["boft_block_num"]
    size = size or m.inputs // max(number, 1)
    return {R: (1, m.inputs // max(size, 1), size, size), S: (m.outputs, 1)}


def read(m: Module, config: Config, tensors: Tensors) -> list:
    return [BOFT(z=tensors[R], scale=tensors[S][:, 0])]


def write(m: Module, nodes: list) -> tuple[Tensors, Config]:
    (node,) = nodes
    linear(m, "BOFT")
    if len(node.z) != 1:
        raise ValueError(f"it has {len(node.z)} factors: PEFT without its CUDA extension reads one alone")
    fields = {"boft_block_size": node.z.shape[-1], "boft_block_num": 0, "boft_n_butterfly_factor": 1}
    return {R: node.z, S: node.scale[:, None]}, fields


def check(config: Config) -> list[str]:
    if config["boft_n_butterfly_factor"] == 1:
        return []
    return [
        f"boft_n_butterfly_factor = {config['boft_n_butterfly_factor']}: with its CUDA extension PEFT makes so many "
        "factors, and one without it. Say 1 in the config if the adapter was made without"
    ]


BOFT_ = Format(
    peft_type="BOFT",
    nodes=(BOFT,),
    bias="boft_only",
    shapes=shapes,
    read=read,
    write=write,
    ends=(R, S),
    fields={"boft_block_size": 4, "boft_block_num": 0, "boft_n_butterfly_factor": 1},
    unused=frozenset({"boft_dropout", "init_weights"}),
    check=check,
)
