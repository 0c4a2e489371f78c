"""Expressions of adapters: which of a stack act in a call, on which rows and tokens.

    Average("a", "b"), Sequence("a", Split("b", "c", at=[10])), Parallel("a", "b", sizes=[2, 6])

Parts are adapters, by name or number, or expressions.
"""

import abc
import itertools
from collections.abc import Sequence as Several
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._node import Additive
from ._routes import ByRow, Chain, One, Place, Route, Weighted, every
from ._tree import Params, map_nodes, nodes_of


class Expression(abc.ABC):
    """What `jpeft.apply(..., adapters=)` takes, beside names, numbers and arrays. See the page on composition."""

    def __init__(self, *parts: Any):
        if not parts:
            raise ValueError(f"{type(self).__name__} is of at least one adapter.")
        self.parts = parts

    @abc.abstractmethod
    def over(self, parts: tuple[Route, ...], place: Place | None) -> Route:
        """The expression of settled parts."""

    def rows(self, place: Place | None) -> Place:
        """**Raises** `ValueError` where there is no call that has rows."""
        if place is None:
            raise ValueError(f"{type(self).__name__} is of the rows of a call: give it to `jpeft.apply`.")
        return place


class Sequence(Expression):
    """One after another: each acts on hidden states that those before it have changed. In kernels they add up."""

    def over(self, parts, place):
        return Chain(parts)


class Average(Expression):
    r"""$\sum_n w_n\,part_n$. All weights are the same, $1 / N$, if left out; negative ones are as good as others."""

    def __init__(self, *parts: Any, weights: jax.typing.ArrayLike | None = None):
        super().__init__(*parts)
        self.weights = jnp.full(len(parts), 1 / len(parts)) if weights is None else jnp.asarray(weights)
        if self.weights.shape != (len(parts),):
            raise ValueError(f"{len(parts)} adapters are averaged with weights of shape {self.weights.shape}.")

    def over(self, parts, place):
        return Weighted(self.weights[None, None], parts)


class Parallel(Expression):
    """The rows of a batch in as many groups, one for each part: of `sizes`, or all of one size.

    A group is not divided again: no part has a `Parallel` in it.
    """

    def __init__(self, *parts: Any, sizes: Several[int] | None = None):
        super().__init__(*parts)
        if any(map(_divides, parts)):
            raise ValueError("Parallel within Parallel: name all groups of rows in one, with their `sizes`.")
        self.sizes = None if sizes is None else tuple(sizes)
        if self.sizes is not None and len(self.sizes) != len(parts):
            raise ValueError(f"{len(parts)} adapters act on groups of rows of {len(self.sizes)} sizes.")

    def over(self, parts, place):
        batch, lengths = self.rows(place).batch, place.lengths
        sizes = self.sizes or (batch // len(parts),) * len(parts)
        if sum(sizes) != batch:
            raise ValueError(f"{batch} rows cannot be divided among {len(parts)} adapters as {sizes}.")
        owner = np.repeat(np.arange(len(parts)), sizes)
        if all(isinstance(part, One) for part in parts):
            return ByRow(jnp.array([part.number for part in parts])[owner], lengths)
        return Weighted(jax.nn.one_hot(owner, len(parts))[:, None], parts, lengths)


def _divides(part: Any) -> bool:
    return isinstance(part, Parallel) or (isinstance(part, Expression) and any(map(_divides, part.parts)))


class Split(Expression):
    """The tokens of every row in ranges: the first part acts before position `at[0]`, the next before `at[1]`, ...

    Positions are places in the sequence, padding counted, from its first token on, also in calls with a cache.
    """

    def __init__(self, *parts: Any, at: Several[int]):
        super().__init__(*parts)
        self.at = tuple(at)
        if len(self.at) != len(parts) - 1 or any(b < a for a, b in itertools.pairwise(self.at)):
            raise ValueError(f"{len(parts)} adapters are divided at {len(parts) - 1} rising positions, not {self.at}.")

    def over(self, parts, place):
        batch, positions = self.rows(place).batch, place.positions
        if positions is None:
            raise ValueError("Split is of tokens, and the model is called with none: give weights of rows and tokens.")
        owner = jnp.searchsorted(jnp.array(self.at, jnp.int32), positions, side="right")
        gates = jax.nn.one_hot(owner, len(parts))
        return Weighted(jnp.broadcast_to(gates, (batch, *gates.shape)), parts, place.lengths)


class Stacked(abc.ABC):
    """A node of several adapters, which `names` tells."""

    names: tuple[str, ...]

    @abc.abstractmethod
    def on(self, route: Route) -> Any:
        """The node with what the adapters do in a call."""


def directed(params: Params, adapters: Any, place: Place | None = None) -> Params:
    """The tree whose stacks know which of their adapters act.

    **Raises** `ValueError` if there are no stacks, and as `settled` does.
    """
    return map_nodes(lambda x: x.on(settled(adapters, x.names, place)), params, Stacked, "stack")


def settled(adapters: Any, names: tuple[str, ...], place: Place | None) -> Route:
    """What `adapters` says, with numbers in place of names. Without a `place`, arrays tell the rows and tokens.

    **Raises** `ValueError` for adapters that there are not, for arrays that fit neither rows nor adapters, and for
    expressions that ask for rows or tokens where there is no place.
    """
    if isinstance(adapters, Expression):
        return adapters.over(tuple(settled(part, names, place) for part in adapters.parts), place)
    if isinstance(adapters, str | int | np.integer):
        known = list(names) if isinstance(adapters, str) else range(len(names))
        if adapters not in known:
            raise ValueError(f"There is no adapter {adapters!r} in this stack: {', '.join(names)}.")
        return One(names.index(adapters) if isinstance(adapters, str) else int(adapters))
    if isinstance(adapters, list | tuple) and all(isinstance(x, str) for x in adapters):
        adapters = np.array([settled(x, names, place).number for x in adapters])
    array = jnp.asarray(adapters)
    whole = jnp.issubdtype(array.dtype, jnp.integer)
    sizes, lengths = array.shape if whole else array.shape[:-1], () if place is None else place.lengths
    if place is not None:
        tokens = lengths[:1] if lengths and array.shape[1:2] not in [(n,) for n in lengths] else array.shape[1:2]
        sizes = (place.batch, *tokens)[: 1 if whole else max(array.ndim - 1, 0)]
    if not 1 <= array.ndim <= (1 if whole else 3) or array.shape != (sizes if whole else (*sizes, len(names))):
        call = "" if place is None else f" and {place.batch} rows" + (f" of {lengths[0]} tokens" if lengths else "")
        raise ValueError(
            f"`adapters` has shape {array.shape} of {array.dtype}, for {len(names)} adapters{call}: integers, one for "
            "every row; or weights, (adapters,), (rows, adapters) or (rows, tokens, adapters)."
        )
    if whole:
        _check_numbers(array, names)
        return ByRow(array, lengths)
    rows, tokens = (*sizes, 1, 1)[:2]
    return Weighted(array.reshape(rows, tokens, len(names)), every(len(names)), lengths)


def _check_numbers(ids: jax.Array, names: tuple[str, ...]) -> None:
    """**Raises** `ValueError` for adapters that there are not, where numbers are there to be seen."""
    if isinstance(ids, jax.core.Tracer) or not ids.is_fully_addressable:
        return
    if wrong := sorted({int(n) for n in np.asarray(ids) if n >= len(names)}):
        raise ValueError(f"There are no adapters {wrong} in this stack: {', '.join(names)}.")


def place_of(args: Any, params: Params) -> Place:
    """Rows and tokens of a call, by its arguments: the shape of the first array of integers `(rows, tokens)`.

    Where there is none, that of the first array: `(rows, tokens, features)`, or else of rows alone. A cache tells how
    many tokens came before, and the tree how many positions prompts add.
    """
    ahead = sum(x.ahead for x in nodes_of(params, Additive).values())
    is_cache = lambda x: hasattr(x, "filled") and hasattr(x, "end")
    leaves = jax.tree.leaves(args, is_leaf=is_cache)
    arrays = [x for x in leaves if hasattr(x, "dtype") and getattr(x, "ndim", 0)]
    ids = [x for x in arrays if x.ndim == 2 and jnp.issubdtype(x.dtype, jnp.integer)]
    if not arrays:
        raise ValueError("Which rows are there? The model was called without an array.")
    shape = (ids or arrays)[0].shape
    if not ids and len(shape) != 3:
        return Place(shape[0], None)
    prompts = lambda cache: ahead if cache.filled and hasattr(cache, "grow") else 0  # a decoder's own has none
    start = next((x.end - prompts(x) for x in leaves if is_cache(x)), 0)
    return Place(shape[0], start + jnp.arange(shape[1]), ahead)
