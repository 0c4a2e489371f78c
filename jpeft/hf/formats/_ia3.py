"""(IA)^3: factors of outputs, or of inputs at the modules that the config calls feed-forward."""

from ...additive._ia3 import IA3
from .._modules import Module
from ._format import Config, Format, Shapes, Tensors, linear


L = "ia3_l"


def _inside(m: Module, config: Config, tensors: Tensors) -> bool:
    """Whether it scales the inputs, `(1, in)`, and not the outputs, `(out, 1)`."""
    shape = tensors[L].shape if L in tensors else ()
    return shape == (1, m.inputs) and shape != (m.outputs, 1)


def shapes(m: Module, config: Config, tensors: Tensors) -> Shapes:
    return {L: (1, m.inputs) if _inside(m, config, tensors) else (m.outputs, 1)}


def read(m: Module, config: Config, tensors: Tensors) -> list:
    return [IA3(scale=tensors[L].reshape(-1), side="in" if _inside(m, config, tensors) else "out")]


def write(m: Module, nodes: list) -> tuple[Tensors, Config]:
    (node,) = nodes
    linear(m, "(IA)^3", conv1d=True)
    inside = node.side == "in"
    return {L: node.scale[None] if inside else node.scale[:, None]}, {"feedforward": inside}


IA3_ = Format(
    peft_type="IA3",
    nodes=(IA3,),
    shapes=shapes,
    read=read,
    write=write,
    ends=(L,),
    fields={},
    unused=frozenset({"init_ia3_weights", "feedforward_modules"}),
    listed={"feedforward": "feedforward_modules"},
)
