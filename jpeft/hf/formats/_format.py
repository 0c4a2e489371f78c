"""What it takes to read and write one type of adapter: which tensors are at a module, and which node they make."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..._node import Additive, Node
from ..._tree import Params
from .._modules import Module
from .._patterns import matches


Config = dict[str, Any]  # of an adapter_config.json, or what one module says of it
Tensors = dict[str, np.ndarray]  # by the end of their name, `lora_A.weight`
Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Wide:
    """The part of a format that is of the whole model, and at no module of theirs.

    **Fields:**

    - `shapes`: `config ->` the tensors that must be there, by name.
    - `put`: `(params, tree, config, tensors) ->` the tree with their nodes. **Raises** `ValueError` with the reason
      where that cannot be.
    - `take`: `(params, tree, nodes by path) ->` tensors, and the config. **Raises** `ValueError`, too.
    """

    shapes: Callable[[Config], Shapes]
    put: Callable[[Params, Any, Config, Tensors], Params]
    take: Callable[[Params, Any, dict[str, Any]], tuple[Tensors, Config]]


@dataclasses.dataclass(frozen=True)
class Shared:
    """A tensor of the whole adapter, as the array that nodes of several modules refer to.

    **Fields:**

    - `name`: of the tensor. There may be several of one, whose arrays differ.
    - `field`: of the nodes.
    - `modules`: whose nodes these are.
    - `shape`: of the tensor, as PEFT makes it.
    - `inward`, `outward`: the tensor as our array, and back.
    - `trains`: whether the array does.
    - `repeated`: whether PEFT writes it at every module, too.
    - `lone`: whether the node of a single module has the array as its own.
    """

    name: str
    field: str
    modules: list[Module]
    shape: tuple[int, ...]
    inward: Callable[[np.ndarray], np.ndarray] = lambda x: x
    outward: Callable[[np.ndarray], np.ndarray] = lambda x: x
    trains: bool = False
    repeated: bool = False
    lone: bool = False


def _none(*_: Any) -> Any:
    raise AssertionError("this format has nothing at modules")


@dataclasses.dataclass(frozen=True)
class Format:
    """A `peft_type`.

    **Fields:**

    - `nodes`: the classes of nodes that it writes.
    - `fields`: those of the config that it reads, with PEFT's defaults, of whose type they must be.
    - `shapes`: `(module, config, tensors) -> ` the tensors that must be at a module, by the end of their name. It may
      look at those that are there, where PEFT does so, too.
    - `read`: `(module, config, tensors) ->` the nodes at a module, in NumPy, those of one matrix and without base.
    - `write`: `(module, nodes) ->` tensors, and the fields of the config that tell of them. **Raises** `ValueError`
      for what the format does not have. Arrays that nodes share are in them, the same object in all.
    - `ends`: of all names of tensors that there may be.
    - `beside`: the classes of nodes of which one may be at a module, too.
    - `unused`: those that change nothing once the adapter is made.
    - `patterns`: fields -> those which say otherwise for some modules.
    - `listed`: what `write` says of a module, true or false -> the field that has the modules where it is true.
    - `shared`: `(config, modules) ->` the tensors of the whole adapter. The modules are in the order of their model.
    - `integers`: the ends of tensors that hold whole numbers.
    - `bias`: what its config's `bias` says where the biases of its modules train; `""` where it has none.
    - `wide`: what it has that is at no module.
    - `around`: a node that its nodes need beside the model, and that is in no file.
    - `on`: to which parameters of ours it is put.
    - `check`: `config ->` faults that the fields' types do not tell.
    - `settle`: the last word on the fields of all modules, by name and in the order of their model, before they become
      a config.
    """

    peft_type: str
    nodes: tuple[type[Node], ...]
    fields: Config
    shapes: Callable[[Module, Config, Tensors], Shapes] = _none
    read: Callable[[Module, Config, Tensors], list[Node]] = _none
    write: Callable[[Module, list[Node]], tuple[Tensors, Config]] = _none
    ends: tuple[str, ...] = ()
    beside: tuple[type[Node], ...] = ()
    unused: frozenset[str] = frozenset()
    patterns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    listed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    shared: Callable[[Config, list[Module]], list[Shared]] | None = None
    integers: tuple[str, ...] = ()
    bias: str = ""
    wide: Wide | None = None
    around: Additive | None = None
    on: Callable[[Module], bool] = lambda m: m.is_weight
    check: Callable[[Config], list[str]] = lambda config: []
    settle: Callable[[dict[str, Config]], dict[str, Config]] = lambda fields: fields

    def at(self, config: Config, module: str) -> Config:
        """The config with what its patterns say of one module."""
        found = dict(config)
        for field, name in self.patterns.items():
            for pattern, x in (config.get(name) or {}).items():
                if matches(rf"(.*\.)?({pattern})", module):  # as PEFT matches them, the first first
                    found[field] = x
                    break
        return found


def inward(x: np.ndarray) -> np.ndarray:
    """A factor `(rank, in)`, or `(rank, channels, height, width)`, as `(in, rank)` with `in` in our order."""
    return np.transpose(x, (*range(2, x.ndim), 1, 0)).reshape(-1, x.shape[0])


def outward(x: np.ndarray, m: Module) -> np.ndarray:
    """Undo `inward`."""
    x = x.reshape(*m.window, -1, x.shape[-1])
    return np.transpose(x, (x.ndim - 1, x.ndim - 2, *range(x.ndim - 2)))


def whole(x: float) -> int | None:
    """The integer that `x` is but for rounding; `None` if it is none."""
    return round(x) if abs(x - round(x)) < 1e-9 * max(1.0, abs(x)) else None


def plain(x: float) -> int | float:
    """`x`, as an integer where it is one."""
    return x if (n := whole(x)) is None else n


def linear(m: Module, what: str, *, conv1d: bool = False) -> None:
    """**Raises** `ValueError` for a kernel that PEFT does not put `what` on; `conv1d`: GPT-2's `Conv1D` it does."""
    if not m.is_weight or m.window or m.experts or m.is_table or (m.transposed and not conv1d):
        raise ValueError(f"PEFT has {what} for linear maps alone")


def positive(config: Config, *names: str, patterns: str = "") -> list[str]:
    """The faults of fields that must be above 0, and of the numbers of patterns: of `r` those of `rank_pattern`."""
    given = {name: config[name] for name in names}
    patterns = "rank_pattern" if "r" in names else patterns
    given |= {f"{patterns}[{pattern!r}]": x for pattern, x in config.get(patterns, {}).items()}
    return [f"{name} = {x!r}: it must be positive" for name, x in given.items() if x < 1]


def projected(config: Config) -> list[str]:
    """The fault of an adapter whose random arrays are not in the file."""
    return [] if config["save_projection"] else [
        "save_projection = False: the projections are not in the file, and only torch's random generator can make "
        "them again. Load the adapter with PEFT, set `save_projection=True` in its config, and save it"
    ]  # fmt: skip


def misfits(prefix: str, expected: Shapes, tensors: Tensors) -> list[str]:
    """The tensors that are missing, unexpected, or of another shape."""
    faults = [f"missing: {prefix}{name}" for name in expected if name not in tensors]
    faults += [f"unexpected: {prefix}{name}" for name in tensors if name not in expected]
    return faults + [
        f"shape: {prefix}{name} is {tensors[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
