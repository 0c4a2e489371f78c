"""CPT: prompts of examples. A file has the changed embeddings, and PEFT goes on from them as from a start."""

from typing import Any

import numpy as np

from ..._tree import Params
from ...additive._cpt import CPT
from ._format import Config, Format, Tensors, Wide
from ._prompt import FIELDS, ROWS, UNUSED, alone, check, placed, shapes, told


IDS, TYPES = "cpt_token_ids", "cpt_tokens_type_mask"
EPSILON, FORMAT_EPSILON = "opt_projection_epsilon", "opt_projection_format_epsilon"


def put(params: Params, tree: Any, config: Config, tensors: Tensors) -> Params:
    ids, types = (tuple(config[name]) for name in (IDS, TYPES))
    own = {"ids": ids, "types": types, "epsilon": config[EPSILON], "format_epsilon": config[FORMAT_EPSILON]}
    node = CPT(rows=tensors[ROWS], delta=np.zeros((0, 0), np.float32), **own)
    delta = np.zeros((len(node.moving), tensors[ROWS].shape[1]), np.float32)
    return placed(params, tree, config, lambda rows: node.replace(rows=rows, delta=delta), tensors[ROWS])


def take(params: Params, tree: Any, nodes: dict[str, Any]) -> tuple[Tensors, Config]:
    node = alone(nodes)
    rows = np.asarray(node.prompt(None))
    own = {IDS: list(node.ids), TYPES: list(node.types), "cpt_mask": [1] * len(node.ids)}
    own |= {EPSILON: node.epsilon, FORMAT_EPSILON: node.format_epsilon}
    return {ROWS: rows}, told(rows, tree) | own


def fits(config: Config) -> list[str]:
    counts = {name: len(config[name]) for name in (IDS, TYPES)} | {"tokens": config["num_virtual_tokens"]}
    faults = [] if len(set(counts.values())) == 1 else [f"{IDS} and {TYPES} have one number for each token: {counts}"]
    if not all(0 <= n < 2**31 for name in (IDS, TYPES) for n in config[name]):
        faults.append(f"the numbers of {IDS} and {TYPES} are from 0 to 2**31 - 1")
    return check(config) + faults


CONTEXT = Format(
    peft_type="CPT",
    nodes=(CPT,),
    fields={**FIELDS, IDS: [0], TYPES: [1], EPSILON: 0.1, FORMAT_EPSILON: 0.1},
    unused=UNUSED | {"cpt_mask", "opt_weighted_loss_type", "opt_loss_decay_factor"},
    check=fits,
    wide=Wide(shapes, put, take),
)
