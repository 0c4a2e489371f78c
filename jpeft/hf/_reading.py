"""The tensors of an adapter as nodes: each module's, then all that are at one parameter of ours."""

import collections
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from .._node import Additive, Node, value
from ..selective._tokens import Tokens
from . import _common
from ._adapter_config import selector
from ._joints import wider
from ._modules import Module
from ._nodes import whole_node
from ._tree import Spelling, Tree
from .formats import WITHIN
from .formats._experts import named, targeted, unnested
from .formats._format import Config, Format, Tensors, misfits


@dataclasses.dataclass
class Reading:
    """What an adapter says of a tree.

    **Fields:**

    - `nodes`: the nodes of single modules, in NumPy, by module.
    - `plain`: tensors that stand for parameters themselves; `declared` are those that train.
    - `shared`: the arrays that nodes refer to, those that train as `Free`.
    - `wide`: tensors of the whole adapter.
    - `faults`: everything that does not fit.
    """

    nodes: dict[Module, list[Node]] = dataclasses.field(default_factory=dict)
    plain: dict[Module, np.ndarray] = dataclasses.field(default_factory=dict)
    declared: set[Module] = dataclasses.field(default_factory=set)
    shared: dict[str, Any] = dataclasses.field(default_factory=dict)
    wide: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    faults: list[str] = dataclasses.field(default_factory=list)


PARTS = "some of its parts train alone, and the tree has them in one array. Load the model without `scan` and `fused`"
TIED = "the output head is tied to this table: PEFT changes one of them alone, and the tree has one parameter for both"


def read(form: Format, config: Config, tensors: Mapping[str, np.ndarray], tree: Tree) -> Reading:
    """Every tensor of an adapter at its place in the tree."""
    found = Reading()
    of_all = _common.of_all(form, tensors)
    tensors, found.faults = _common.unrepeated(tensors, of_all)
    names = {re.sub(r"^base_model\.(model\.)?", "", name): x for name, x in tensors.items()}
    if form.wide is not None:
        expected = form.wide.shapes(config)
        found.wide = {name: names.pop(name) for name in expected if name in names}
        found.faults += misfits("", expected, found.wide)
    spelling = tree.spelling(names)
    own = _single({spelling.ours(name): x for name, x in names.items()}, config, tree, found)
    own = unnested(own, config, tree) if form.peft_type == "LORA" else own
    forms = [form, *[x for x in (WITHIN.get(form.peft_type),) if x and config.get("trainable_token_indices")]]
    grouped: dict[tuple[int, Module], Tensors] = collections.defaultdict(dict)
    for name, x in own.items():
        at = next((at for n, f in enumerate(forms) if (at := _place(n, f, name, tree))), None)
        if at is not None:
            grouped[at[0], at[1]][at[2]] = x
        elif m := _parameter(name, tree):
            found.plain[m] = x
        else:
            found.faults.append(f"unexpected: {name}")
    for (n, m), group in grouped.items():
        _read_module(forms[n], m, config, group, found)
    found.shared, faults = _common.shared(form, config, of_all, tree, found.nodes)
    found.faults += faults
    _check_targets(form, config, tree, spelling, found)
    _check_plain(form, config, tree, spelling, found)
    return found


def _single(tensors: Mapping[str, np.ndarray], config: Config, tree: Tree, found: Reading) -> dict[str, np.ndarray]:
    """The tensors without those that a file repeats at other modules with the same table: they must be the same."""
    single = dict(tensors)
    for name, x in tensors.items():
        double = next((double for double in tree.doubles if name.startswith(f"{double}.")), None)
        if double is None:
            continue
        del single[name]
        other = tree.doubles[double] + name.removeprefix(double)
        m = tree.parameters.get(other)
        whole = tensors.get(other, m and m.take(np.asarray(value(tree.leaves[m.path]))))
        if _saved(double, config) or whole is None:
            found.faults.append(f"{name}: {TIED}")
        elif not np.array_equal(x, whole):
            found.faults.append(f"{name} is another than {other}, and the tree has one table for both")
    return single


def _saved(name: str, config: Config) -> bool:
    """Whether `modules_to_save` names a module or one that it is in."""
    return any(f".{name}.".find(f".{end}.") >= 0 for end in config.get("modules_to_save") or [])


def _place(n: int, form: Format, name: str, tree: Tree) -> tuple[int, Module, str] | None:
    for end in form.ends:
        if name.endswith(f".{end}") and (m := tree.weights.get(name.removesuffix(f".{end}"))):
            return n, m, end
    return None


def _parameter(name: str, tree: Tree) -> Module | None:
    """The parameter that a tensor of this name stands for, within a wrapper of PEFT's or not."""
    name = re.sub(r"\.(base_layer|ln_tuning_layers)\.(?=\w+$)", ".", name)
    return tree.parameters.get(name)


def _read_module(form: Format, m: Module, config: Config, tensors: Tensors, found: Reading) -> None:
    own = form.at(config, m.name)
    faults = misfits(f"{m.name}.", form.shapes(m, own, tensors), tensors)
    try:
        found.nodes[m] = [] if faults else form.read(m, own, tensors)
    except ValueError as error:
        faults = [f"{m.name}: {error}"]
    found.faults += faults


def _check_targets(form: Format, config: Config, tree: Tree, spelling: Spelling, found: Reading) -> None:
    """That every module is there which the config names, and no other."""
    parameters = config.get("target_parameters") or []
    experts = [m for group in targeted(parameters, tree).values() for m in group if m not in found.nodes]
    found.faults += [f"missing: the tensors at {m.name}, which target_parameters names" for m in experts]
    chosen = selector(config)
    if chosen is None:
        return
    there = {m.path: m for m in found.nodes} | {m.path: m for m in found.plain}
    for m in tree.today:
        absent = m not in found.nodes and m not in found.plain and not m.experts
        renamed = m.path in there and there[m.path] not in tree.at[m.path]  # found under a former name
        if absent and not renamed and form.on(m) and chosen(spelling.theirs(m.name)):
            found.faults.append(f"missing: the tensors at {m.name}, which target_modules names")
    for m, nodes in found.nodes.items():
        tokens = any(isinstance(node, Tokens) for node in nodes)  # named by fields of their own
        if nodes and not (tokens or named(m.parameter, parameters) or chosen(spelling.theirs(m.name))):
            found.faults.append(f"unexpected: the tensors at {m.name}, which target_modules does not name")


def _check_plain(form: Format, config: Config, tree: Tree, spelling: Spelling, found: Reading) -> None:
    """That parameters are in the file where the config says so, and only there, each of its shape."""
    targets, bias = {m.owner for m in found.nodes}, config.get("bias") or "none"
    trains = lambda m: m.is_bias and (bias == "all" or (bias.endswith("_only") and m.owner in targets))
    wanted = {m for m in tree.today if trains(m) or _saved(spelling.theirs(m.parameter), config)}
    found.faults += [f"missing: {m.parameter}" for m in wanted if m not in found.plain]
    for m, x in found.plain.items():
        if x.shape != m.shape:
            found.faults.append(f"shape: {m.parameter} is {x.shape}, expected {m.shape}")
        # PEFT writes tables, too, that it has put something on, or that it thinks have grown.
        if form.nodes and m not in wanted and not m.is_table and not m.parameter.endswith("lm_head.weight"):
            found.faults.append(f"unexpected: {m.parameter}")
    changed = [m for m, nodes in found.nodes.items() if not any(isinstance(node, Tokens) for node in nodes)]
    found.faults += [f"{m.name}: {TIED}" for m in {*changed, *(wanted & found.plain.keys())} if tree.is_tied(m)]
    found.declared = wanted if form.nodes else {*found.plain}
    for path, parts in by_path(dict.fromkeys(found.declared)).items():
        if len(parts) < len(tree.together(next(iter(parts)))):
            found.faults.append(f"{path}: {PARTS}")


def nodes_at(found: Reading, tree: Tree) -> dict[str, list[Node]]:
    """The nodes at every parameter of ours, by path. What cannot be is added to the faults."""
    nodes: dict[str, list[Node]] = {}
    for path, group in by_path(found.nodes).items():
        kinds: dict[bool, dict[Module, Node]] = collections.defaultdict(dict)
        for m, several in group.items():
            for node in several:
                kinds[isinstance(node, Additive)][m] = node
        try:
            nodes[path] = [whole_node(given, tree.together(next(iter(given)))) for given in kinds.values()]
        except ValueError as error:
            found.faults.append(f"{path}: {error}")
    return nodes


def by_path(given: Mapping[Module, Any]) -> dict[str, dict[Module, Any]]:
    """What there is for modules by the path of our parameter."""
    found: dict[str, dict[Module, Any]] = collections.defaultdict(dict)
    for m, x in given.items():
        found[m.path][m] = x
    return found


def array(leaf: Any, given: Mapping[Module, np.ndarray]) -> np.ndarray:
    """A parameter of all its parts."""
    whole = np.empty(value(leaf).shape, wider(*{x.dtype for x in given.values()}))
    for m, x in given.items():
        m.put(whole, x)
    return whole
