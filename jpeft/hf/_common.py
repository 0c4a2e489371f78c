"""Tensors that are of a whole adapter, and at no module: arrays that many nodes share."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from .._node import Node
from .._shared import Ref
from ..selective._unfreeze import Free
from ._modules import Module
from ._tree import Tree
from .formats._format import Config, Format, Tensors, misfits


def of_all(form: Format, tensors: Mapping[str, np.ndarray]) -> Tensors:
    """Those of a file that are of the whole adapter."""
    names = [re.fullmatch(r"base_model\.(?!model\.)(.*)", name) for name in tensors if form.shared is not None]
    return {match[1]: tensors[match[0]] for match in names if match}


def unrepeated(tensors: Mapping[str, np.ndarray], common: Tensors) -> tuple[dict[str, np.ndarray], list[str]]:
    """The tensors at modules, without those that repeat one of the whole adapter; and those that are another."""
    single, faults = {}, []
    for name, x in tensors.items():
        last = name.rpartition(".")[2]
        if name.removeprefix("base_model.") in common:
            continue
        if last not in common:
            single[name] = x
        elif not np.array_equal(x, common[last]):
            faults.append(f"{name} is another than base_model.{last}: the nodes here have one for all")
    return single, faults


def shared(
    form: Format, config: Config, tensors: Tensors, tree: Tree, nodes: dict[Module, list[Node]]
) -> tuple[dict[str, Any], list[str]]:
    """The arrays that nodes share, to which these refer from now on; and the faults."""
    parts = form.shared(config, tree.declared(nodes)) if form.shared is not None and nodes else []
    if faults := misfits("base_model.", {of.name: of.shape for of in parts}, tensors):
        return {}, faults
    found: dict[str, Any] = {}
    for n, of in enumerate(parts):
        x, name = of.inward(tensors[of.name]), of.name.replace(".", "_").lower()
        name = f"{name}_{n}" if name in found else name
        lone = of.lone and len(of.modules) == 1
        if not lone:
            found[name] = Free(array=x) if of.trains else x
        for m in of.modules:
            nodes[m] = [node.replace(**{of.field: x if lone else Ref(name)}) for node in nodes[m]]
    return found, []


def written(
    form: Format, config: Config, nodes: Mapping[Module, Node], tree: Tree
) -> tuple[Tensors, Tensors, list[str]]:
    """The tensors of the whole adapter, what PEFT repeats of them at modules, and the faults."""
    whole: Tensors = {}
    repeated: Tensors = {}
    faults = []
    for of in form.shared(config, tree.declared(nodes)) if form.shared is not None else []:
        arrays = [getattr(nodes[m], of.field) for m in of.modules]
        x = _fitted(of.outward(arrays[0]), of.shape)
        before = whole.setdefault(f"base_model.{of.name}", x)
        if any(array is not arrays[0] for array in arrays) or not np.array_equal(x, before):
            faults.append(f"{of.field}: PEFT has one {of.name} for all modules, and here they have others")
        repeated |= {f"{m.name}.{of.name}": x for m in of.modules if of.repeated}
    return whole, repeated, faults


def _fitted(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Of another shape: no module uses what is left out, or the zeros that are added."""
    room = np.zeros(shape, x.dtype)
    common = tuple(slice(min(sizes)) for sizes in zip(x.shape, shape, strict=True))
    room[common] = x[common]
    return room
