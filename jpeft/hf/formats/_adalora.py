"""AdaLoRA. Files leave masked triplets out; `rank_pattern` tells where they were."""

import numpy as np

from ...reparam._adalora import AdaLoRA
from .._modules import Module
from . import _lora
from ._format import Config, Format, Shapes, Tensors, inward, linear, plain, positive


A, B, E = "lora_A", "lora_B", "lora_E"
EPSILON = 1e-5  # in the scale


def _kept(m: Module, config: Config) -> list[bool] | None:
    """Which of the `init_r` triplets are there; `None` where all are."""
    names = f"{m.name}.{E}", f"{m.name}.{E}.default"
    return next((config["rank_pattern"][name] for name in names if name in config["rank_pattern"]), None)


def shapes(m: Module, config: Config, tensors: Tensors) -> Shapes:
    kept = _kept(m, config)
    rank = config["init_r"] if kept is None else sum(kept)
    return {A: (rank, m.inputs), B: (m.outputs, rank), E: (rank, 1)}


def read(m: Module, config: Config, tensors: Tensors) -> list:
    mask = np.array(_kept(m, config) or [True] * config["init_r"])
    parts = {"a": inward(tensors[A]), "e": tensors[E][:, 0], "b": inward(tensors[B])}
    if not mask.all():  # zeros in the places of those that are left out
        room = {"a": (m.inputs, mask.size), "e": (mask.size,), "b": (mask.size, m.outputs)}
        at = {"a": np.s_[:, mask], "e": np.s_[mask], "b": np.s_[mask]}
        for name, x in parts.items():
            parts[name] = np.zeros(room[name], x.dtype)
            parts[name][at[name]] = x
    scale = config["lora_alpha"] / (config["init_r"] + EPSILON)
    return [AdaLoRA(**parts, mask=mask, scale=scale, dropout=config["lora_dropout"])]


def write(m: Module, nodes: list) -> tuple[Tensors, Config]:
    (node,) = nodes
    linear(m, "AdaLoRA", conv1d=True)
    mask, rank = node.mask.astype(bool), node.mask.size
    fields = {"init_r": rank, "lora_alpha": plain(node.scale * (rank + EPSILON)), "lora_dropout": node.dropout}
    if not mask.all():
        fields["rank_pattern"] = {f"{m.name}.{E}": mask.tolist()}
    return {A: node.a[:, mask].T, B: node.b[mask].T, E: node.e[mask][:, None]}, fields


def check(config: Config) -> list[str]:
    faults = positive(config, "init_r")
    for name, kept in config["rank_pattern"].items():
        if not (isinstance(kept, list) and len(kept) == config["init_r"] and all(isinstance(x, bool) for x in kept)):
            faults.append(f"rank_pattern[{name!r}] must be {config['init_r']} truth values")
    return faults


def settle(fields: dict[str, Config]) -> dict[str, Config]:
    masks = {name: kept for x in fields.values() for name, kept in x.get("rank_pattern", {}).items()}
    # PEFT reads no config without `total_step`, of the training that is over.
    return {module: x | {"rank_pattern": masks, "total_step": 1} for module, x in fields.items()}


ADALORA = Format(
    peft_type="ADALORA",
    nodes=(AdaLoRA,),
    bias="lora_only",
    shapes=shapes,
    read=read,
    write=write,
    ends=(A, B, E),
    fields={"init_r": 12, "lora_alpha": 8.0, "lora_dropout": 0.0, "rank_pattern": {}},
    unused=_lora.UNUSED | {"r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight",
                           "total_step"},
    check=check,
    settle=settle,
)  # fmt: skip
