"""TinyLoRA. Its factors and random matrices must be in the file; its vectors are of the whole adapter."""

import numpy as np

from ...reparam._tinylora import TinyLoRA
from .._modules import Module
from ._format import Config, Format, Shapes, Shared, Tensors, positive, projected


A, B, P, V = "tinylora_A", "tinylora_B", "tinylora_P", "tinylora_v"


def shapes(m: Module, config: Config, tensors: Tensors) -> Shapes:
    r = min(config["r"], m.inputs, m.outputs)
    a, b = (m.outputs, m.inputs) if m.is_table else (m.inputs, m.outputs)  # which torch has as (in, out)
    return {A: (r, a), B: (b, r), P: (config["u"], r, r)}


def read(m: Module, config: Config, tensors: Tensors) -> list:
    a, b, p = tensors[A].T, tensors[B].T, np.swapaxes(tensors[P], 1, 2)
    frozen = {"a": b.T, "b": a.T, "p": tensors[P]} if m.is_table else {"a": a, "b": b, "p": p}
    return [TinyLoRA(**frozen, v=None, dropout=config["tinylora_dropout"])]


def write(m: Module, nodes: list) -> tuple[Tensors, Config]:
    (node,) = nodes
    if m.window or m.experts:
        raise ValueError("PEFT has TinyLoRA for linear maps and tables alone")
    fields = {"r": node.a.shape[-1], "u": len(node.p), "tinylora_dropout": node.dropout, "save_projection": True}
    if m.is_table:
        return {A: node.b, B: node.a, P: node.p}, fields | {"v": node.v}
    return {A: node.a.T, B: node.b.T, P: np.swapaxes(node.p, 1, 2)}, fields | {"v": node.v}


def groups(count: int, tying: float) -> list[int]:
    """Which vector each of `count` modules has."""
    vectors = max(1, round(count * (1.0 - tying)))
    return [min(n // max(1, count // vectors), vectors - 1) for n in range(count)]


def shared(config: Config, modules: list[Module]) -> list[Shared]:
    of = groups(len(modules), config["weight_tying"])
    each = {n: [m for m, k in zip(modules, of, strict=True) if k == n] for n in of}
    return [Shared(f"{V}.{n}", "v", own, (config["u"],), trains=True, lone=True) for n, own in each.items()]


def settle(fields: dict[str, Config]) -> dict[str, Config]:
    """How far modules share vectors: those that do are next to each other, and everywhere as many."""
    numbers: dict[int, int] = {}
    found = [numbers.setdefault(id(x["v"]), len(numbers)) for x in fields.values()]
    tying = 1 - len(numbers) / len(found)
    if found != groups(len(found), tying):
        raise ValueError("PEFT has one vector for so many modules in a row; here others share vectors")
    others = lambda x: {name: y for name, y in x.items() if name != "v"}
    return {module: others(x) | {"weight_tying": tying} for module, x in fields.items()}


def check(config: Config) -> list[str]:
    tying = config["weight_tying"]
    faults = [] if 0 <= tying <= 1 else [f"weight_tying = {tying}: from 0 to 1"]
    return faults + positive(config, "r", "u") + projected(config)


TINYLORA = Format(
    peft_type="TINYLORA",
    nodes=(TinyLoRA,),
    bias="tinylora_only",
    shapes=shapes,
    read=read,
    write=write,
    ends=(A, B, P),
    fields={"r": 2, "u": 64, "weight_tying": 0.0, "tinylora_dropout": 0.0, "save_projection": True},
    unused=frozenset({"projection_seed", "init_v_bound", "init_weights"}),
    shared=shared,
    check=check,
    settle=settle,
)
