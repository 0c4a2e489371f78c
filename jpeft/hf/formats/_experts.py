"""Experts in LoRA's files: PEFT wraps their module once for each parameter, and names no parameter.

The wrappers nest in the order in which the module declares its parameters, the first innermost:
`experts.base_layer.lora_A.weight` is of the first, `experts.lora_A.weight` of the last.
"""

import collections
import re
from collections.abc import Mapping

import numpy as np

from .._modules import Module
from .._tree import Tree
from ._format import Config


def named(parameter: str, names: list[str]) -> bool:
    """Whether `target_parameters` has a parameter, as PEFT reads it."""
    return any(f".{parameter}".endswith(f".{name}") for name in names)


def targeted(names: list[str], tree: Tree) -> dict[str, list[Module]]:
    """The experts' parameters that `target_parameters` names, in the order of their declaration, by module."""
    found = collections.defaultdict(list)
    for m in tree.today:
        if m.experts and named(m.parameter, names):
            found[m.parameter.rpartition(".")[0]].append(m)
    return found


def unnested(tensors: Mapping[str, np.ndarray], config: Config, tree: Tree) -> dict[str, np.ndarray]:
    """The tensors with the names of the parameters that they are of, instead of wrappers."""
    found = dict(tensors)
    for module, parameters in targeted(config.get("target_parameters") or [], tree).items():
        nested = re.compile(rf"{re.escape(module)}((?:\.base_layer)*)\.(lora_[AB]\.\w+)")
        for name in tensors:
            if match := nested.fullmatch(name):
                depth = match[1].count(".base_layer")
                if depth < len(parameters):
                    found[f"{parameters[-1 - depth].name}.{match[2]}"] = found.pop(name)
    return found


def nested(names: list[str], tree: Tree) -> dict[str, str]:
    """Of experts' parameters the names of the wrappers that PEFT gives them."""
    return {
        m.name: module + ".base_layer" * (len(parameters) - 1 - n)
        for module, parameters in targeted(names, tree).items()
        for n, m in enumerate(parameters)
    }
