"""Expressions of adapters as a call evaluates them, at every place of a model: pytrees.

A change of their arrays is no new trace.
"""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ._operands import Operand


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the rows and the tokens of a call are."""

    batch: int
    positions: jax.Array  # (seq,), counted from the start of the text


class Members(abc.ABC):
    """The adapters at one place of a model: what an expression is evaluated with."""

    moves: bool  # whether in a sequence each acts on what those before it have made of `x`

    @abc.abstractmethod
    def one(self, number: int, x: Any) -> Any:
        """What the adapter of that number adds for `x`; `None` where it has nothing here."""

    @abc.abstractmethod
    def by_row(self, ids: jax.Array, x: jax.Array) -> Any:
        """What the adapters `ids (rows,)` add for the rows of `x`; for those below zero, nothing."""


class Route(abc.ABC):
    """An expression that is settled."""

    @abc.abstractmethod
    def __call__(self, members: Members, x: Any) -> Any:
        """What it adds for `x (rows..., in)`; `None` for nothing."""


def _pytree(*static: str):
    """A frozen dataclass and a pytree, with these fields static."""

    def register(cls):
        cls = dataclasses.dataclass(frozen=True)(cls)
        fields = [f.name for f in dataclasses.fields(cls)]
        return jax.tree_util.register_dataclass(cls, [n for n in fields if n not in static], list(static))

    return register


@_pytree("number")
class One(Route):
    number: int

    def __call__(self, members, x):
        return members.one(self.number, x)


def every(count: int) -> tuple["Route", ...]:
    """All adapters of a stack."""
    return tuple(map(One, range(count)))


@_pytree()
class ByRow(Route):
    """For every row its own adapter."""

    ids: jax.Array  # (batch,)

    def __call__(self, members, x):
        ids, batch = self.ids, len(self.ids)
        if not isinstance(x, Operand) and x.shape[0] != batch:
            if x.ndim > 2 or x.shape[0] % batch:
                raise ValueError(f"Adapters are chosen for {batch} rows, and what enters a layer is {x.shape}.")
            ids = jnp.repeat(ids, x.shape[0] // batch)  # rows and tokens on one axis
        return members.by_row(ids, x)


@_pytree()
class Weighted(Route):
    r"""$\sum_n g_n\,part_n(x)$."""

    gates: jax.Array  # (batch or 1, seq or 1, parts)
    parts: tuple[Route, ...]

    def __call__(self, members, x):
        total = None
        for n, part in enumerate(self.parts):
            if (y := part(members, x)) is not None:
                y = y * self.gate(n, y)
                total = y if total is None else total + y
        return total

    def gate(self, n: int, y: jax.Array) -> jax.Array:
        """The gates of a part, as they multiply what it adds."""
        batch, seq = self.gates.shape[:2]
        gate = self.gates[..., n].astype(y.dtype)
        if batch == seq == 1:
            return gate.reshape(())
        lead = y.shape[:-1]
        if len(lead) == 1 and lead[0] == batch * seq:  # rows and tokens on one axis
            return gate.reshape(-1, 1)
        fits = lead[0] == batch or batch == 1
        if not fits or (seq > 1 and (len(lead) < 2 or lead[1] < seq)):
            raise ValueError(
                f"Adapters have weights for {batch} rows of {seq} tokens, and what a layer returns has the shape "
                f"{y.shape}: leave it out of their `targets`, or give weights for rows alone."
            )
        if seq > 1:  # what stands before the tokens, such as a prompt, goes with the first
            gate = jnp.pad(gate, ((0, 0), (lead[1] - seq, 0)), mode="edge")
        return gate.reshape(*gate.shape[: len(lead)], *[1] * (y.ndim - min(2, len(lead))))


@_pytree()
class Chain(Route):
    """One after another."""

    parts: tuple[Route, ...]

    def __call__(self, members, x):
        total = None
        for part in self.parts:
            y = part(members, x + total if members.moves and total is not None else x)
            total = y if total is None else total if y is None else total + y
        return total
