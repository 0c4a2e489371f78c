"""Parameters that train themselves as tensors of an adapter."""

from collections.abc import Iterable

import numpy as np

from .._node import value
from ._adapter_config import shortened
from ._modules import Module
from ._reading import TIED
from ._tree import Tree
from .formats._format import Config, Format, Tensors
from .formats._norms import NORMS


def parameters(
    form: Format, free: set[str], adapted: Iterable[Module], tree: Tree
) -> tuple[Tensors, Config, list[str]]:
    """The free parameters of a tree beside adapters on modules: tensors, fields of the config, and faults.

    They go as norms, as biases, or else with all of their module.
    """
    chosen = {m for path in free for m in tree.at[path]}
    if form is NORMS:
        return _norms(chosen, tree)
    owners = {m.owner for m in adapted}
    biases = {m for m in tree.today if m.is_bias}
    near = {m for m in biases if m.owner in owners}
    whole = {m for m in chosen if {x for x in tree.today if x.owner == m.owner} <= chosen}
    left = {m for m in chosen & biases if m not in whole}
    saved, config = chosen - left, {}
    if left and form.bias:
        config["bias"] = form.bias if left <= near else "all"
        left = near if left <= near else biases
    else:
        saved, left = saved | left, set()
    names = _closed(_modules(saved), tree)
    saved = {m for m in tree.today if any(f"{m.parameter}.".startswith(f"{name}.") for name in names)}
    faults = [f"{m.path}: a parameter trains beside an adapter on it" for m in saved if m.owner in owners]
    faults += [f"{m.path}: {TIED}" for m in saved if tree.is_tied(m)]
    if names:
        config["modules_to_save"] = names
    tensors = {_wrapped(m, "base_layer" if m.owner in owners else ""): _own(m, tree) for m in left | saved}
    return tensors, config, faults


def _norms(chosen: set[Module], tree: Tree) -> tuple[Tensors, Config, list[str]]:
    norms = {path.rpartition("/")[0] for path in tree.leaves if path.endswith("/scale") or path == "scale"}
    faults = []
    if others := sorted(m.path for m in chosen if m.owner not in norms):
        faults.append(
            f"these parameters train, and no adapter is there that they could be saved with: {', '.join(others[:8])}. "
            "`jpeft.hf.save` writes the whole model"
        )
    owners = {m.owner for m in chosen}
    own = [m for m in tree.today if m.owner in owners]
    config = {"target_modules": shortened(_modules(own), _modules(tree.today))}
    return {_wrapped(m, "ln_tuning_layers"): _own(m, tree) for m in own}, config, faults


def _modules(parameters: Iterable[Module]) -> set[str]:
    return {m.parameter.rpartition(".")[0] for m in parameters}


def _wrapped(m: Module, wrapper: str) -> str:
    """The name of a parameter within a wrapper of PEFT's, if there is one."""
    module, _, last = m.parameter.rpartition(".")
    return ".".join([module, wrapper, last] if wrapper else [module, last])


def _own(m: Module, tree: Tree) -> np.ndarray:
    return m.take(np.asarray(value(tree.leaves[m.path])))


def _closed(names: set[str], tree: Tree) -> list[str]:
    """The modules, and all whose names end like theirs, as PEFT takes these, too; a parent instead of all children."""
    known = _modules(tree.today)
    while more := {name for name in known - names if any(name.endswith(end) for end in names)}:
        names = names | more
    for parent in sorted({name.rpartition(".")[0] for name in names} - {""}):
        children = {name for name in known if name.startswith(f"{parent}.")}
        if children <= names and not any(name.endswith(parent) for name in known):
            names = names - children | {parent}
    return sorted(names)
