"""LoKr. Torch's matrices are `(out, in)`, and which of them are products the names of the tensors tell."""

import math
from typing import Any

from ...reparam._lokr import LoKr, factorization
from .._modules import Module
from ._format import Config, Format, Shapes, Tensors, inward, linear, outward, plain, positive
from ._loha import UNUSED, core, core_back, over_window, spread


W1, W1A, W1B = "lokr_w1", "lokr_w1_a", "lokr_w1_b"
W2, W2A, W2B, T2 = "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"


def shapes(m: Module, config: Config, tensors: Tensors) -> Shapes:
    r, window = config["r"], m.window
    (out1, out2), (in1, in2) = (factorization(n, config["decompose_factor"]) for n in (m.outputs, m.channels))
    found: Shapes = {W1: (out1, in1)} if W1 in tensors else {W1A: (out1, r), W1B: (r, in1)}
    if W2 in tensors:
        return found | {W2: (out2, in2, *window)}
    if spread(config, m):
        return found | {T2: (r, r, *window), W2A: (r, out2), W2B: (r, in2)}
    return found | {W2A: (out2, r), W2B: (r, in2 * math.prod(window))}


def read(m: Module, config: Config, tensors: Tensors) -> list:
    w1: Any = tensors[W1].T if W1 in tensors else (tensors[W1B].T, tensors[W1A].T)
    if W2 in tensors:
        w2: Any = inward(tensors[W2])
    elif spread(config, m):
        w2 = tensors[W2B].T, tensors[W2A], core(tensors[T2])
    else:
        w2 = over_window(tensors[W2B], m), tensors[W2A].T
    return [LoKr(w1=w1, w2=w2, scale=config["alpha"] / config["r"], window=math.prod(m.window))]


def write(m: Module, nodes: list) -> tuple[Tensors, Config]:
    (node,) = nodes
    if not m.window:
        linear(m, "LoKr")
    (in1, out1), (in2, out2) = _sizes(node.w1), _sizes(node.w2)
    in2 = in2 if _spread(node.w2) else in2 // node.window
    same = lambda f: (factorization(m.channels, f)[0], factorization(m.outputs, f)[0]) == (in1, out1)
    factors = {f for f in (-1, in1, out1) if same(f)}
    if not factors:
        raise ValueError(f"PEFT factors {m.channels} inputs and {m.outputs} outputs otherwise than by {in1} and {out1}")
    ranks = {x[1].shape[-2] for x in (node.w1, node.w2) if isinstance(x, tuple)}
    fields = {"ranks": ranks, "scale": node.scale, "factors": factors, "use_effective_conv2d": _spread(node.w2)}
    fields["sides"] = max(in1, out1), max(in2, out2)
    fields["whole"] = tuple(not isinstance(x, tuple) for x in (node.w1, node.w2))
    tensors = {W1A: node.w1[1].T, W1B: node.w1[0].T} if isinstance(node.w1, tuple) else {W1: node.w1.T}
    if _spread(node.w2):
        a, b, t = node.w2
        return tensors | {W2A: b, W2B: a.T, T2: core_back(t, m)}, fields
    if isinstance(node.w2, tuple):
        a, b = node.w2
        return tensors | {W2A: b.T, W2B: outward(a, m).reshape(a.shape[-1], -1)}, fields
    return tensors | {W2: outward(node.w2, m)}, fields


def _spread(x: Any) -> bool:
    return isinstance(x, tuple) and len(x) == 3


def _sizes(x: Any) -> tuple[int, int]:
    """The inputs and outputs of a matrix, or of a product."""
    return (x[0].shape[0], x[1].shape[1]) if isinstance(x, tuple) else x.shape


def settle(fields: dict[str, Config]) -> dict[str, Config]:
    """One rank for all: PEFT takes a matrix whole where the rank is at least half of its larger side."""
    both = any(not x["whole"][0] for x in fields.values())
    ranks = set().union(*(x["ranks"] for x in fields.values()))
    least = [-(-n // 2) for x in fields.values() for n, whole in zip(x["sides"], x["whole"], strict=True) if whole]
    r = max([*least, *ranks])
    factors = set.intersection(*(x["factors"] for x in fields.values()))
    for module, x in fields.items():
        made = (not (both and 2 * r < x["sides"][0]), 2 * r >= x["sides"][1])
        if made != x["whole"] or x["ranks"] - {r}:
            raise ValueError(f"{module}: PEFT has one rank for all, {r} here, which makes other matrices whole")
    if not factors:
        raise ValueError("PEFT has one `decompose_factor` for all modules, and no one makes these matrices")
    shared = {"r": r, "decompose_both": both, "decompose_factor": min(factors)}
    own = lambda x: {"alpha": plain(x["scale"] * r), "use_effective_conv2d": x["use_effective_conv2d"]}
    return {module: shared | own(x) for module, x in fields.items()}


LOKR = Format(
    peft_type="LOKR",
    nodes=(LoKr,),
    shapes=shapes,
    read=read,
    write=write,
    ends=(W1, W1A, W1B, W2, W2A, W2B, T2),
    fields={"r": 8, "alpha": 8.0, "use_effective_conv2d": False, "decompose_both": False, "decompose_factor": -1,
            "rank_pattern": {}, "alpha_pattern": {}},
    unused=UNUSED,
    patterns={"r": "rank_pattern", "alpha": "alpha_pattern"},
    check=lambda config: positive(config, "r"),
    settle=settle,
)  # fmt: skip
