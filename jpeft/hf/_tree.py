"""A tree of parameters as an adapter of PEFT's sees it: parameters and modules by transformers' names."""

import collections
import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn

from .._targets import named_leaves
from .._tree import Params
from . import architectures
from ._guess import guess
from ._modules import Module, modules
from ._names import Architecture


@dataclasses.dataclass(frozen=True)
class Tree:
    """Parameters and their names.

    **Fields:**

    - `leaves`: by our path.
    - `today`, `former`: what `modules` returns.
    - `prefix`: what names of bare models lack.
    - `tied`: names of parameters that are not in the tree, as another takes their place -> that one's.
    """

    leaves: Mapping[str, Any]
    today: list[Module]
    former: list[Module]
    prefix: str
    tied: Mapping[str, str]

    @classmethod
    def of(cls, params: Params, model: nn.Module | None, names: Iterable[str] = ()) -> "Tree":
        """**Raises** `ValueError` for parameters without a name, and where it is not clear which model they are of."""
        leaves = named_leaves(params)
        if model is None:
            return guess(leaves, functools.partial(cls._named, leaves), names)
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if kind not in architectures.ARCHITECTURES:
            known = ", ".join(sorted(architectures.ARCHITECTURES))
            raise ValueError(f"{type(model).__name__} has {kind!r} for its config's `model_type`: one of {known}.")
        architecture = architectures.ARCHITECTURES[kind]
        tree = cls._named(leaves, architecture, architecture.rows(model))
        if nameless := tree.nameless:
            raise ValueError(f"These parameters are not {type(model).__name__}'s: {', '.join(nameless[:8])}.")
        return tree

    @classmethod
    def _named(cls, leaves: Mapping[str, Any], architecture: Architecture, rows) -> "Tree":
        today, former = modules(rows, leaves)
        known = {m.parameter for m in today}
        tied = {theirs: ours for theirs, ours in architecture.tied.items() if theirs not in known}
        return cls(leaves, today, former, architecture.prefix, tied)

    @property
    def nameless(self) -> list[str]:
        """The paths of parameters that have no name."""
        named = {m.path for m in self.today}
        return [path for path in self.leaves if path not in named]

    @functools.cached_property
    def parameters(self) -> dict[str, Module]:
        """Every parameter by each of its names."""
        return {m.parameter: m for m in (*self.former, *self.today)}

    @functools.cached_property
    def weights(self) -> dict[str, Module]:
        """Every kernel and table by the names of its module."""
        return {m.name: m for m in (*self.former, *self.today) if m.is_weight}

    @functools.cached_property
    def doubles(self) -> dict[str, str]:
        """Modules that share a table of the tree -> the module that has it here."""
        end = lambda name: name.removesuffix(".weight")
        return {end(theirs): end(ours) for theirs, ours in self.tied.items() if ours in self.parameters}

    @functools.cached_property
    def at(self) -> dict[str, list[Module]]:
        """What each parameter of ours is made of, by path, under today's names."""
        found = collections.defaultdict(list)
        for m in self.today:
            found[m.path].append(m)
        return dict(found)

    def together(self, m: Module) -> list[Module]:
        """All that the parameter of ours is made of that `m` is a part of."""
        return self.at[m.path] if m in self.at[m.path] else [x for x in self.former if x.path == m.path]

    def declared(self, some: Iterable[Module]) -> list[Module]:
        """Modules in the order in which transformers' model has them: layer by layer, and in each as in the rows."""
        ranks: dict[str, int] = {}
        keys = {}
        for m in (*self.today, *self.former):
            starts = [m.parameter[: match.start()] for match in re.finditer(r"\.", m.parameter)]
            numbers = [re.search(r"\d+$", start) for start in starts]
            keys[m] = [int(n[0]) if n else ranks.setdefault(re.sub(r"\d+", "", start), len(ranks))
                       for start, n in zip(starts, numbers, strict=True)]  # fmt: skip
        return sorted(some, key=lambda m: keys[m])

    def is_tied(self, m: Module) -> bool:
        """Whether the model uses the table elsewhere, too, under another name."""
        return m.parameter in self.tied.values()

    def heads(self, name: str) -> list[str]:
        """The modules and parameters of the tree whose name, with something behind it, this is."""
        starts = [name[: match.start()] for match in re.finditer(r"\.", f"{name}.")]
        return [start for start in starts if start in self._known]

    @functools.cached_property
    def _known(self) -> set[str]:
        modules = {parameter.rpartition(".")[0] for parameter in self.parameters}
        return {*self.parameters, *self.weights, *modules} - {""}

    def spelling(self, names: Iterable[str]) -> "Spelling":
        """How names of modules lie to ours: as they are, with the prefix of a bare model to add, or to leave out."""
        names = list(names)
        ways = Spelling("", ""), Spelling("", self.prefix), Spelling(self.prefix, "")
        return max(ways, key=lambda way: sum(bool(self.heads(way.ours(name))) for name in names))


@dataclasses.dataclass(frozen=True)
class Spelling:
    """Names in a file begin with `file` where ours begin with `own`; one of both is empty."""

    file: str
    own: str

    def ours(self, name: str) -> str:
        return self.own + name.removeprefix(self.file)

    def theirs(self, name: str) -> str:
        return self.file + name.removeprefix(self.own)
