"""RoAd. Its variants differ in how many angles two outputs have."""

import math

from ...reparam._road import SIDES, RoAd
from .._modules import Module
from ._format import Config, Format, Shapes, Tensors, linear


THETA, ALPHA = "road_theta", "road_alpha"
VARIANTS = {f"road_{variant}": sides for variant, sides in SIDES.items()}


def shapes(m: Module, config: Config, tensors: Tensors) -> Shapes:
    size = m.outputs // 2 * math.prod(VARIANTS[config["variant"]])
    return {THETA: (size,), ALPHA: (size,)}


def read(m: Module, config: Config, tensors: Tensors) -> list:
    group = config["group_size"]
    if m.outputs % group:
        raise ValueError(f"groups of {group} do not divide {m.outputs} outputs")
    shape = m.outputs // group, *VARIANTS[config["variant"]], group // 2
    return [RoAd(theta=tensors[THETA].reshape(shape), alpha=tensors[ALPHA].reshape(shape))]


def write(m: Module, nodes: list) -> tuple[Tensors, Config]:
    (node,) = nodes
    linear(m, "RoAd")
    _, *sides, half = node.theta.shape
    variant = next(name for name, own in VARIANTS.items() if own == tuple(sides))
    return {THETA: node.theta.reshape(-1), ALPHA: node.alpha.reshape(-1)}, {"variant": variant, "group_size": 2 * half}


def check(config: Config) -> list[str]:
    variant, group = config["variant"], config["group_size"]
    faults = [] if variant in VARIANTS else [f"variant = {variant!r}: one of {', '.join(VARIANTS)}"]
    return faults + [f"group_size = {group}: it must be even, and positive"] * (group < 2 or group % 2)


ROAD = Format(
    peft_type="ROAD",
    nodes=(RoAd,),
    shapes=shapes,
    read=read,
    write=write,
    ends=(THETA, ALPHA),
    fields={"variant": "road_1", "group_size": 64},
    unused=frozenset({"init_weights"}),
    check=check,
)
