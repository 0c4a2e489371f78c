"""OFT. How many inputs a block has is read off the tensor: PEFT changes what its config asks for to what divides."""

import math

from ...reparam._oft import OFT
from .._modules import Module
from ._format import Config, Format, Shapes, Tensors, linear


R = "oft_R.weight"


def _block(pairs: int) -> int:
    """How many inputs have so many pairs among them."""
    return (1 + math.isqrt(1 + 8 * pairs)) // 2


def shapes(m: Module, config: Config, tensors: Tensors) -> Shapes:
    block = _block(tensors[R].shape[-1]) if R in tensors and tensors[R].ndim else config["oft_block_size"] or 1
    return {R: (1 if config["block_share"] else m.inputs // block, block * (block - 1) // 2)}


def read(m: Module, config: Config, tensors: Tensors) -> list:
    block = _block(tensors[R].shape[-1])
    if m.inputs % block:
        raise ValueError(f"blocks of {block} do not divide {m.inputs} inputs")
    cayley = "neumann" if config["use_cayley_neumann"] else "exact"
    epsilon = config["eps"] if config["coft"] else None
    terms = config["num_cayley_neumann_terms"]
    return [OFT(generators=tensors[R], block=block, cayley=cayley, terms=terms, epsilon=epsilon)]


def write(m: Module, nodes: list) -> tuple[Tensors, Config]:
    (node,) = nodes
    linear(m, "OFT")
    blocks = m.inputs // node.block
    share = None if blocks == 1 else len(node.generators) == 1
    fields = {"r": 0, "oft_block_size": node.block, "block_share": share, "coft": node.epsilon is not None,
              "use_cayley_neumann": node.cayley == "neumann", "num_cayley_neumann_terms": node.terms,
              "eps": node.epsilon}  # fmt: skip
    return {R: node.generators}, fields


def check(config: Config) -> list[str]:
    terms = config["num_cayley_neumann_terms"]
    # Each is a product of matrices: a number out of all proportion would take for ever.
    return [] if 1 < terms <= 1000 else [f"num_cayley_neumann_terms = {terms}: it must be above 1, and 1000 at most"]


OFT_ = Format(
    peft_type="OFT",
    nodes=(OFT,),
    bias="oft_only",
    shapes=shapes,
    read=read,
    write=write,
    ends=(R,),
    fields={"r": 0, "oft_block_size": 32, "block_share": False, "coft": False, "eps": 6e-5, "use_cayley_neumann": True,
            "num_cayley_neumann_terms": 5},
    unused=frozenset({"module_dropout", "init_weights"}),
    check=check,
)  # fmt: skip
