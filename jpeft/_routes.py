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
    positions: jax.Array | None  # (seq,), counted from the start of the text; none where tokens are not known
    ahead: int = 0  # how many positions prompts put before those of the tokens

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many tokens a layer may see; none where that is not known."""
        return () if self.positions is None else (len(self.positions), len(self.positions) + self.ahead)


class Members(abc.ABC):
    """The adapters at one place of a model: what an expression is evaluated with."""

    count: int  # how many they are
    moves: bool  # whether in a sequence each acts on what those before it have made of `x`

    @abc.abstractmethod
    def one(self, number: int, x: Any) -> Any:
        """What the adapter of that number adds for `x`; `None` where it has nothing here."""

    @abc.abstractmethod
    def by_row(self, ids: jax.Array, x: jax.Array) -> Any:
        """What the adapters `ids (rows,)` add for the rows of `x`: nothing below zero, NaN if there is none such."""


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


@_pytree("lengths")
class ByRow(Route):
    """For every row its own adapter."""

    ids: jax.Array  # (batch,)
    lengths: tuple[int, ...] = ()  # of the place

    def __call__(self, members, x):
        ids, batch = self.ids, len(self.ids)
        if isinstance(x, Operand):  # what is looked up or convolved has no rows before the product
            return Weighted(jax.nn.one_hot(ids, members.count)[:, None], every(members.count), self.lengths)(members, x)
        if x.shape[0] != batch:
            tokens, rest = divmod(x.shape[0], batch)
            if x.ndim > 2 or rest or (self.lengths and tokens not in self.lengths):
                raise ValueError(
                    f"Adapters are chosen for {batch} rows, and what enters a layer is {x.shape}: leave it out of "
                    "their `targets`."
                )
            ids = jnp.repeat(ids, tokens)  # rows and tokens on one axis
        return members.by_row(ids, x)


@_pytree("lengths")
class Weighted(Route):
    r"""$\sum_n g_n\,part_n(x)$."""

    gates: jax.Array  # (batch, seq or 1, parts), or (1, 1, parts) for all rows
    parts: tuple[Route, ...]
    lengths: tuple[int, ...] = ()

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
        flat = len(lead) == 1 and lead[0] != batch  # rows and tokens on one axis
        tokens = lead[0] // batch if flat else (*lead, 1)[1]
        known = tokens >= seq and tokens in (self.lengths if seq == 1 else (seq, *self.lengths))
        if lead[0] != (batch * tokens if flat else batch) or not (known or (seq == 1 and not flat)):
            raise ValueError(
                f"Adapters have weights for {batch} rows of {seq} tokens, and what a layer returns has the shape "
                f"{y.shape}: leave it out of their `targets`, or give weights for rows alone."
            )
        if seq > 1 or flat:  # what stands before the tokens, such as a prompt, goes with the first
            gate = jnp.pad(gate, ((0, 0), (tokens - seq, 0)), mode="edge")
        if flat:
            return gate.reshape(-1, 1)
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
