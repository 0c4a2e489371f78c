"""Poly and MHR: skills, and the logits of every task."""

from ...additive._tasks import Tasks
from ...mixture._poly import Poly
from .._modules import Module
from ._format import Config, Format, Shapes, Tensors, linear, positive


A, B, LOGITS = "poly_lora_A", "poly_lora_B", "poly_router.module_logits"


def shapes(m: Module, config: Config, tensors: Tensors) -> Shapes:
    splits, skills, rank = config["n_splits"], config["n_skills"], config["r"]
    return {
        A: (splits, skills, m.inputs // splits, rank),
        B: (splits, skills, rank, m.outputs // splits),
        LOGITS: (config["n_tasks"], splits * skills),
    }


def read(m: Module, config: Config, tensors: Tensors) -> list:
    logits = tensors[LOGITS].reshape(config["n_tasks"], config["n_splits"], config["n_skills"])
    return [Poly(a=tensors[A], b=tensors[B], logits=logits, scale=1 / config["r"])]


def write(m: Module, nodes: list) -> tuple[Tensors, Config]:
    (node,) = nodes
    linear(m, "Poly")
    splits, skills, _, rank = node.a.shape
    b = node.b if node.scale == 1 / rank else node.b * (node.scale * rank)
    logits = node.logits.reshape(len(node.logits), -1)
    sizes = {"r": rank, "n_tasks": len(logits), "n_skills": skills, "n_splits": splits}
    return {A: node.a, B: b, LOGITS: logits}, sizes


def check(config: Config) -> list[str]:
    kind = config["poly_type"]
    faults = [] if kind == "poly" else [f"poly_type = {kind!r}: 'poly' alone is known"]
    return faults + positive(config, "r", "n_tasks", "n_skills", "n_splits")


POLY = Format(
    peft_type="POLY",
    nodes=(Poly,),
    shapes=shapes,
    read=read,
    write=write,
    ends=(A, B, LOGITS),
    fields={"r": 8, "n_tasks": 1, "n_skills": 4, "n_splits": 1, "poly_type": "poly"},
    unused=frozenset({"init_weights"}),
    around=Tasks(),
    check=check,
)
