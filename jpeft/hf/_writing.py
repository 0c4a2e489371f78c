"""The nodes of a tree as the tensors and the config of an adapter."""

import collections
import dataclasses

import numpy as np

from .._manifest import is_form
from .._merge import beside
from .._node import Leaf, Node, Reparam, value
from .._tree import Params, modules, shared_arrays
from ..selective._tokens import Tokens
from ..selective._unfreeze import Free
from ._adapter_config import merged, shortened
from ._modules import Module
from ._nodes import part_of
from ._reading import TIED
from ._tree import Tree
from .formats import SILENT, WITHIN, WRITERS
from .formats._experts import nested
from .formats._format import Config, Format
from .formats._norms import NORMS
from .formats._tokens import TOKENS, TOKENS_WITHIN


# PEFT writes the table itself beside what is put on these.
EMBEDDINGS = ("embed_tokens", "lm_head")


@dataclasses.dataclass
class Writing:
    """An adapter in the making.

    **Fields:**

    - `tensors`: by their names in the file, and in `shared` those of the whole adapter.
    - `config`: what the adapter says of itself.
    - `fields`: what each format's modules say, by name.
    - `adapted`: the modules that the adapter is put on.
    - `faults`: everything that PEFT does not have.
    """

    tree: Tree
    tensors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    shared: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    config: Config = dataclasses.field(default_factory=dict)
    fields: dict[str, dict[str, Config]] = dataclasses.field(default_factory=lambda: collections.defaultdict(dict))
    adapted: list[Module] = dataclasses.field(default_factory=list)
    faults: list[str] = dataclasses.field(default_factory=list)


def write(params: Params, tree: Tree, task_type: str | None = None) -> Writing:
    """The adapter that the nodes of a tree are, for a type of task."""
    out = Writing(tree)
    nodes, wide, free = _found(params, tree, out.faults)
    form = _format({type(own[0]) for own in (*nodes.values(), *([x] for x in wide.values()))}, bool(free), out.faults)
    if out.faults:
        return out
    if wide:
        _write_wide(form, params, wide, out)
    for path, own in nodes.items():
        inner = isinstance(own[0], Tokens) and form is not TOKENS
        _write_nodes(TOKENS_WITHIN if inner else form, path, own, out)
    _write_config(form, out)
    _write_free(form, free, out)
    _write_shared(form, params, nodes, out)
    prefix = "base_model." if wide else "base_model.model."
    out.tensors = {prefix + name: x for name, x in out.tensors.items()} | out.shared
    out.config["task_type"] = task_type or out.config.get("task_type")
    if wide and out.config["task_type"] is None:
        out.faults.append('PEFT reads prompts by the type of the task: pass `task_type=`, such as "SEQ_CLS"')
    return out


def _found(
    params: Params, tree: Tree, faults: list[str]
) -> tuple[dict[str, list[Node]], dict[str, Node], set[str]]:
    """The nodes at every parameter, one in its place first; those at no parameter; and parameters that are free."""
    nodes: dict[str, list[Node]] = collections.defaultdict(list)
    wide: dict[str, Node] = {}
    free = set()
    for path, leaf in tree.leaves.items():
        if isinstance(leaf, Free):
            free.add(path)
        elif isinstance(leaf, Leaf) and not is_form(leaf):
            nodes[path].append(leaf)
            if isinstance(leaf, Reparam) and isinstance(leaf.base, Reparam):
                faults.append(f"{path}: {type(leaf).__name__} over {type(leaf.base).__name__}; PEFT has one of them")
    for owner, own in modules(params).items():
        for name, node in beside(own):
            form = WRITERS.get(type(node))
            if form and form.wide:
                wide[f"{owner}/{name}"] = node
            elif not isinstance(node, SILENT):
                nodes[f"{owner}/kernel" if form and f"{owner}/kernel" in tree.at else f"{owner}/{name}"].append(node)
    for path, own in nodes.items():
        unknown = [type(node).__name__ for node in own if type(node) not in WRITERS or path not in tree.at]
        faults += [f"{path}: {name} is nothing that PEFT has" for name in unknown]
    return dict(nodes), wide, free


def _write_wide(form: Format, params: Params, nodes: dict[str, Node], out: Writing) -> None:
    try:
        out.shared, out.config = form.wide.take(params, out.tree, nodes)
    except ValueError as error:
        out.faults.append(str(error))


def _format(kinds: set[type[Node]], free: bool, faults: list[str]) -> Format:
    """The format of all nodes."""
    forms = {WRITERS[kind].peft_type: WRITERS[kind] for kind in kinds if kind in WRITERS}
    if len(forms) == 2 and TOKENS.peft_type in forms and (outer := WITHIN.keys() & forms.keys()):
        return forms[outer.pop()]
    if len(forms) > 1:
        faults.append(f"an adapter of PEFT is of one type, and the nodes here are of {', '.join(sorted(forms))}")
    if not forms and not free:
        faults.append("nothing trains in this tree: there is no adapter in it")
    return next(iter(forms.values()), NORMS)


def _write_nodes(form: Format, path: str, own: list[Node], out: Writing) -> None:
    """What all modules that a parameter is made of say."""
    for m in out.tree.at[path]:
        try:
            parts = [part for node in own if (part := part_of(node, m)) is not None]
            if not parts or not any(isinstance(part, form.nodes) for part in parts):
                continue
            tensors, out.fields[form.ends[0]][m.name] = form.write(m, parts)
        except ValueError as error:
            out.faults.append(f"{path}: {error}")
            return
        if out.tree.is_tied(m) and not isinstance(own[0], Tokens):
            out.faults.append(f"{path}: {TIED}")
        names = [m.name, *(double for double, name in out.tree.doubles.items() if name == m.name and form is TOKENS)]
        out.tensors |= {f"{name}.{end}": x for name in names for end, x in tensors.items()}
        if form is TOKENS_WITHIN:
            continue
        out.adapted.append(m)
        if m.name.rpartition(".")[2] in EMBEDDINGS and form is not TOKENS:
            base = own[0].original if isinstance(own[0], Leaf) else out.tree.leaves[path]
            out.tensors[f"{m.name}.base_layer.weight"] = m.take(np.asarray(value(base)))


def _write_config(form: Format, out: Writing) -> None:
    """What all modules say, and which they are. Experts get the names of PEFT's wrappers."""
    out.config["peft_type"] = form.peft_type
    lists = [(name, {module: x.pop(field) for module, x in out.fields[form.ends[0]].items()})
             for field, name in form.listed.items()]  # fmt: skip
    for own in (form, WITHIN.get(form.peft_type)):
        if own is None or not own.ends or not out.fields[own.ends[0]]:
            continue
        try:
            said, faults = merged(own.settle(out.fields[own.ends[0]]), own.patterns)
        except ValueError as error:
            said, faults = {}, [str(error)]
        out.config |= said
        out.faults += faults
    if not form.ends:
        return
    known = [m for m in out.tree.today if m.is_weight]
    names = lambda of, experts=False: {m.name for m in of if bool(m.experts) is experts}
    out.config["target_modules"] = shortened(names(out.adapted), names(known))
    for name, said in lists:  # PEFT compares the words of both lists
        groups = [{module for module, x in said.items() if x is which} for which in (True, False)]
        out.config[name], others = (shortened(group, names(known)) for group in groups)
        out.config["target_modules"] = sorted({*out.config[name], *others})
    if parameters := shortened(names(out.adapted, True), names(known, True)):
        out.config["target_parameters"] = parameters
        for name, wrapper in nested(parameters, out.tree).items():
            own = [n for n in out.tensors if n.startswith(f"{name}.lora_")]
            out.tensors |= {wrapper + n.removeprefix(name): out.tensors.pop(n) for n in own}
    if any(m.transposed for m in out.adapted):
        out.config["fan_in_fan_out"] = True


def _write_shared(form: Format, params: Params, nodes: dict[str, list[Node]], out: Writing) -> None:
    """Arrays of all nodes; their names in the file have a shorter prefix."""
    for name, field in form.shared.items():
        refs = {getattr(own[0], field) for own in nodes.values()}
        if len(refs) > 1:
            out.faults.append(f"{field}: PEFT has one {name} for all modules, and here there are {len(refs)}")
        out.shared[f"base_model.{name}"] = np.asarray(shared_arrays(params)[refs.pop().name]).T


def _write_free(form: Format, free: set[str], out: Writing) -> None:
    """Parameters that train themselves: as norms, as biases, or else with all of their module."""
    chosen = {m for path in free for m in out.tree.at[path]}
    if form is NORMS:
        _write_norms(chosen, out)
        return
    adapted = {m.owner for m in out.adapted}
    biases = {m for m in out.tree.today if m.is_bias}
    near = {m for m in biases if m.owner in adapted}
    whole = {m for m in chosen if {x for x in out.tree.today if x.owner == m.owner} <= chosen}
    left = {m for m in chosen & biases if m not in whole}
    saved = chosen - left
    if left and form.bias:
        out.config["bias"] = form.bias if left <= near else "all"
        left = near if left <= near else biases
    else:
        saved, left = saved | left, set()
    names = _closed({m.parameter.rpartition(".")[0] for m in saved}, out.tree)
    saved = {m for m in out.tree.today if any(f"{m.parameter}.".startswith(f"{name}.") for name in names)}
    out.faults += [f"{m.path}: a parameter trains beside an adapter on it" for m in saved if m.owner in adapted]
    out.faults += [f"{m.path}: {TIED}" for m in saved if out.tree.is_tied(m)]
    if names:
        out.config["modules_to_save"] = names
    for m in left | saved:
        module, _, last = m.parameter.rpartition(".")
        wrapper = ".base_layer" if m.owner in adapted else ""
        out.tensors[f"{module}{wrapper}.{last}"] = m.take(np.asarray(value(out.tree.leaves[m.path])))


def _write_norms(chosen: set[Module], out: Writing) -> None:
    norms = {path.rpartition("/")[0] for path in out.tree.leaves if path.endswith("/scale") or path == "scale"}
    others = sorted(m.path for m in chosen if m.owner not in norms)
    if others:
        out.faults.append(
            f"these parameters train, and no adapter is there that they could be saved with: {', '.join(others[:8])}. "
            "`jpeft.hf.save` writes the whole model"
        )
    owners = {m.owner for m in chosen}
    own = [m for m in out.tree.today if m.owner in owners]
    names = lambda modules: {m.parameter.rpartition(".")[0] for m in modules}
    out.config["target_modules"] = shortened(names(own), names(out.tree.today))
    for m in own:
        module, _, last = m.parameter.rpartition(".")
        out.tensors[f"{module}.ln_tuning_layers.{last}"] = m.take(np.asarray(value(out.tree.leaves[m.path])))


def _closed(names: set[str], tree: Tree) -> list[str]:
    """The modules, and all whose names end like theirs, as PEFT takes these, too; a parent instead of all children."""
    known = {m.parameter.rpartition(".")[0] for m in tree.today}
    while more := {name for name in known - names if any(name.endswith(end) for end in names)}:
        names = names | more
    for parent in sorted({name.rpartition(".")[0] for name in names} - {""}):
        children = {name for name in known if name.startswith(f"{parent}.")}
        if children <= names and not any(name.endswith(parent) for name in known):
            names = names - children | {parent}
    return sorted(names)
