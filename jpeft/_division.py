"""How a mesh of devices divides a parameter, and with it the arrays that belong to it."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from ._kernel import IN, OUT, STACK


Entry = tuple[str, ...]  # the axes of a mesh that divide one axis of an array together

DATA_AXES = ("data", "fsdp", "replica")  # axes of a mesh that divide the batch, as they are mostly called


@dataclasses.dataclass(frozen=True)
class Division:
    """What of a mesh divides the stacked axes of a parameter, and the inputs and outputs of its matrices.

    Arrays whose axes are the kernel's (`"in"`, `"out"`) are divided as it is, if they are of its size; those that are
    smaller, such as the factors of a low rank, only along axes that are not `data`: those divide the batch, too, and
    gathering an adapter along them in every step would cost more than they save.
    """

    whole: NamedSharding  # of the parameter
    stack: tuple[Entry, ...] = ()
    inputs: Entry = ()
    outputs: Entry = ()
    data: frozenset[str] = frozenset()

    @classmethod
    def of(cls, sharding: NamedSharding, shape: Sequence[int], axes: str, data: Iterable[str] = ()) -> "Division":
        """That of a parameter of a `shape`, whose axes have these letters: none, if they mean nothing."""
        entries = entries_of(sharding.spec, len(shape))
        at = lambda letter: [n for n, c in enumerate(axes) if c == letter]
        fold = lambda letter: _folded([(shape[n], entries[n]) for n in at(letter)], sharding.mesh)
        return cls(sharding, tuple(entries[n] for n in at(STACK)), fold(IN), fold(OUT), frozenset(data))

    def without_data(self) -> "Division":
        """That along the axes that divide no batch."""
        less = lambda entry: tuple(a for a in entry if a not in self.data)
        stack = tuple(map(less, self.stack))
        return dataclasses.replace(self, stack=stack, inputs=less(self.inputs), outputs=less(self.outputs))

    def array(self, shape: Sequence[int], dims: Sequence[str] | None) -> NamedSharding:
        """The sharding of an array of a `shape`, whose last axes are `dims`, and whose first are stacked.

        An axis that devices do not divide evenly is whole on each.
        """
        dims = () if dims is None else dims
        given = self if {"in", "out"} <= {*dims} else self.without_data()
        depth = len(shape) - len(dims)
        stack = given.stack if len(given.stack) == depth else ((),) * depth
        known = {"in": given.inputs, "group": given.inputs, "out": given.outputs, "features": given.outputs}
        return self._fitting(shape, (*stack, *(known.get(dim, ()) for dim in dims)))

    def each(self, x: Any) -> Any:
        """The parameter's own sharding in place of every array of `x`."""
        return jax.tree.map(lambda _: self.whole, x)

    def like_parameter(self, shape: Sequence[int]) -> NamedSharding:
        """The sharding of an array of a `shape`, whose axes are the parameter's, of sizes that may differ."""
        return self._fitting(shape, entries_of(self.whole.spec, len(shape)))

    def _fitting(self, shape: Sequence[int], entries: Iterable[Entry]) -> NamedSharding:
        found: list[Entry] = []
        for size, entry in zip(shape, entries, strict=True):
            taken = {a for other in found for a in other}
            found.append(entry if not taken & {*entry} and size % self.parts(entry) == 0 else ())
        return NamedSharding(self.whole.mesh, PartitionSpec(*(entry or None for entry in found)))

    def parts(self, entry: Entry) -> int:
        """Into how many parts the axes of an entry divide."""
        return _parts(entry, self.whole.mesh)


def entries_of(spec: PartitionSpec, ndim: int) -> list[Entry]:
    """The entries of a specification, one for every axis."""
    entries = [() if x is None else x if isinstance(x, tuple) else (x,) for x in spec]
    return entries + [()] * (ndim - len(entries))


def replicated(mesh: Any) -> NamedSharding:
    """Of an array that is whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def _parts(entry: Entry, mesh: Any) -> int:
    return math.prod(mesh.shape[a] for a in entry)


def _folded(axes: list[tuple[int, Entry]], mesh: Any) -> Entry:
    """What divides axes that are folded into one: it can be told while all before are divided into single places."""
    found: Entry = ()
    for size, entry in axes:
        found += entry
        if size != _parts(entry, mesh):
            break
    return found
