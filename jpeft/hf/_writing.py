"""The nodes of a tree as the tensors and the config of an adapter."""

import collections
import dataclasses

import jax
import numpy as np

from .._manifest import is_form
from .._merge import beside
from .._node import Leaf, Node, Reparam, value
from .._shared import Ref
from .._tree import Params, modules, shared_arrays
from ..selective._tokens import Tokens
from ..selective._unfreeze import Free
from . import _common
from ._adapter_config import merged, shortened
from ._free import parameters
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
    - `adapted`: the modules that the adapter is put on; `nodes` are those there, in NumPy, with the arrays they share.
    - `faults`: everything that PEFT does not have.
    """

    tree: Tree
    tensors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    shared: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    config: Config = dataclasses.field(default_factory=dict)
    fields: dict[str, dict[str, Config]] = dataclasses.field(default_factory=lambda: collections.defaultdict(dict))
    adapted: list[Module] = dataclasses.field(default_factory=list)
    nodes: dict[Module, Node] = dataclasses.field(default_factory=dict)
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
    arrays = {name: np.asarray(x) for name, x in shared_arrays(params).items()}
    for path, own in nodes.items():
        inner = isinstance(own[0], Tokens) and form is not TOKENS
        _write_nodes(TOKENS_WITHIN if inner else form, path, own, arrays, out)
    _write_config(form, out)
    tensors, config, faults = parameters(form, free, out.adapted, tree)
    out.tensors |= tensors
    out.config |= config
    out.faults += faults
    if not out.faults:
        whole, repeated, out.faults = _common.written(form, out.config, out.nodes, tree)
        out.shared |= whole
        out.tensors |= repeated
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
            if isinstance(leaf, Reparam) and isinstance(leaf.base, Leaf) and not is_form(leaf.base):
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


def _write_nodes(form: Format, path: str, own: list[Node], arrays: dict[str, np.ndarray], out: Writing) -> None:
    """What all modules that a parameter is made of say; `arrays` are those that nodes share."""
    is_ref = lambda x: isinstance(x, Ref)
    filled = lambda part: jax.tree.map(lambda x: arrays[x.name] if is_ref(x) else x, part, is_leaf=is_ref)
    for m in out.tree.at[path]:
        try:
            parts = [filled(part) for node in own if (part := part_of(node, m)) is not None]
            if not parts or not any(isinstance(part, form.nodes) for part in parts):
                continue
            if len(parts) > 2 or not all(isinstance(part, form.beside) for part in parts[1:]):
                raise ValueError(f"{', '.join(type(part).__name__ for part in parts)}; PEFT has one of them")
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
        out.nodes[m] = parts[0]
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
            fields = out.fields[own.ends[0]]
            ordered = {m.name: fields[m.name] for m in out.tree.declared(out.tree.today) if m.name in fields}
            said, faults = merged(own.settle(ordered), own.patterns)
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
