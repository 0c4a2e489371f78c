"""Multitask prompts: shared rows, and two factors for each task."""

from typing import Any

import numpy as np

from ..._tree import Params
from ...additive._mpt import MPT
from ._format import Config, Format, Shapes, Tensors, Wide
from ._prompt import FIELDS, ROWS, UNUSED, alone, check, placed, told


U, V = "prefix_task_cols", "prefix_task_rows"


def shapes(config: Config) -> Shapes:
    tasks, rank, length = config["num_tasks"], config["num_ranks"], config["num_virtual_tokens"]
    total = length * config["num_transformer_submodules"]
    return {ROWS: (total, config["token_dim"]), U: (tasks, total, rank), V: (tasks, rank, config["token_dim"])}


def put(params: Params, tree: Any, config: Config, tensors: Tensors) -> Params:
    if config["num_transformer_submodules"] > 1:
        raise ValueError("PEFT puts multitask prompts before a decoder's tokens, too, which no node here does")
    new = lambda rows: MPT(rows=rows, u=tensors[U], v=tensors[V])
    return placed(params, tree, config, new, tensors[ROWS], tasks=True)


def take(params: Params, tree: Any, nodes: dict[str, Any]) -> tuple[Tensors, Config]:
    node = alone(nodes)
    rows, u, v = (np.asarray(x) for x in (node.rows, node.u, node.v))
    return {ROWS: rows, U: u, V: v}, {**told(rows, tree), "num_tasks": len(u), "num_ranks": u.shape[-1]}


MULTITASK = Format(
    peft_type="MULTITASK_PROMPT_TUNING",
    nodes=(MPT,),
    fields={**FIELDS, "num_tasks": 1, "num_ranks": 1},
    unused=UNUSED,
    check=check,
    wide=Wide(shapes, put, take),
)
