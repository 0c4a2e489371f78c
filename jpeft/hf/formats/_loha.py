"""LoHa. Torch's product is `(out, in)`: the first factor of each pair is at the outputs."""

import numpy as np

from ...reparam._loha import LoHa
from .._modules import Module
from ._format import Config, Format, Shapes, Tensors, inward, linear, outward, plain, positive


W1A, W1B, W2A, W2B = "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"
T1, T2 = "hada_t1", "hada_t2"
UNUSED = frozenset({"rank_dropout", "module_dropout", "init_weights", "rank_dropout_scale"})


def spread(config: Config, m: Module) -> bool:
    """Whether factors are spread over a convolution's window by a tensor of their own."""
    return config["use_effective_conv2d"] and m.window not in ((), (1, 1))


def shapes(m: Module, config: Config, tensors: Tensors) -> Shapes:
    r = config["r"]
    if spread(config, m):
        pair = {W1A: (r, m.outputs), W1B: (r, m.channels), W2A: (r, m.outputs), W2B: (r, m.channels)}
        return pair | {T1: (r, r, *m.window), T2: (r, r, *m.window)}
    return {W1A: (m.outputs, r), W1B: (r, m.inputs), W2A: (m.outputs, r), W2B: (r, m.inputs)}


def over_window(x: np.ndarray, m: Module) -> np.ndarray:
    """A factor `(rank, in)` whose `in` is channels, height, width: `(in, rank)` in our order."""
    return inward(x.reshape(x.shape[0], -1, *m.window))


def core(x: np.ndarray) -> np.ndarray:
    """`(rank of out, rank of in, height, width)` as `(window, rank of in, rank of out)`."""
    return np.transpose(x, (2, 3, 1, 0)).reshape(-1, x.shape[1], x.shape[0])


def core_back(x: np.ndarray, m: Module) -> np.ndarray:
    """Undo `core`."""
    return np.transpose(x.reshape(*m.window, *x.shape[1:]), (3, 2, 0, 1))


def read(m: Module, config: Config, tensors: Tensors) -> list:
    scale = config["alpha"] / config["r"]
    if spread(config, m):
        a1, a2, cores = tensors[W1B].T, tensors[W2B].T, {"t1": core(tensors[T1]), "t2": core(tensors[T2])}
        return [LoHa(a1=a1, b1=tensors[W1A], a2=a2, b2=tensors[W2A], scale=scale, **cores)]
    a1, a2 = over_window(tensors[W1B], m), over_window(tensors[W2B], m)
    return [LoHa(a1=a1, b1=tensors[W1A].T, a2=a2, b2=tensors[W2A].T, scale=scale)]


def write(m: Module, nodes: list) -> tuple[Tensors, Config]:
    (node,) = nodes
    if not m.window:
        linear(m, "LoHa")
    r = node.b1.shape[0]
    fields = {"r": r, "alpha": plain(node.scale * r), "use_effective_conv2d": node.t1 is not None}
    if node.t1 is not None:
        cores = {T1: core_back(node.t1, m), T2: core_back(node.t2, m)}
        return {W1A: node.b1, W1B: node.a1.T, W2A: node.b2, W2B: node.a2.T, **cores}, fields
    back = lambda a: outward(a, m).reshape(r, -1)
    return {W1A: node.b1.T, W1B: back(node.a1), W2A: node.b2.T, W2B: back(node.a2)}, fields


LOHA = Format(
    peft_type="LOHA",
    nodes=(LoHa,),
    shapes=shapes,
    read=read,
    write=write,
    ends=(W1A, W1B, W2A, W2B, T1, T2),
    fields={"r": 8, "alpha": 8.0, "use_effective_conv2d": False, "rank_pattern": {}, "alpha_pattern": {}},
    unused=UNUSED,
    patterns={"r": "rank_pattern", "alpha": "alpha_pattern"},
    check=lambda config: positive(config, "r"),
)
