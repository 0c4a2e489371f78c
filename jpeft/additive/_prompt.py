"""Prompt tuning: trainable embeddings before those of the tokens."""

import abc
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from .._node import Additive, Static, Trainable, value
from .._targets import TABLE, Targets, named_leaves, no_match, select
from .._tree import Params, default, modules, place, transform
from ._room import Opened, Room, opened, positions
from ._template import Template


class SoftPrompt(Additive):
    """$E' = [P; E(ids)]$, or $P$ in the places of a token: stands beside the token embedding.

    A `Room` or a `Template` around the model gives it the positions.
    """

    length: Static[int] = 0  # of embeddings
    start: Static[int] = 0  # the position of the first: those of prompts that were there come before
    placeholder: Static[int | None] = None  # the token whose places they take; `None`: they stand before the text

    @abc.abstractmethod
    def prompt(self, tasks: jax.Array | None) -> jax.Array:
        """$P$, (length, features), or (batch, length, features) where it is one for every example's task."""

    def at_rest(self, task=None):
        rows = self.prompt(None if task is None else jnp.array([task]))
        place = {"length": self.length, "start": self.start, "placeholder": self.placeholder}
        return Prompt(rows=rows.reshape(rows.shape[-2:]), **place)

    def output(self, y, ids, *args):
        room = opened()
        if room is not None and (not room.has(ids) or (room.cached and self.placeholder is None)):
            return y
        if y.ndim != 3 or room is None:
            raise self._no_room(y)
        rows = self.prompt(room.tasks).astype(y.dtype)
        rows = jnp.broadcast_to(rows, (y.shape[0], *rows.shape[-2:]))
        return self._before(y, rows, room) if self.placeholder is None else self._within(y, rows, room)

    def _before(self, y: jax.Array, rows: jax.Array, room: Opened) -> jax.Array:
        end = self.start + self.length
        if room.length < end or y.shape[1] <= end:
            raise self._no_room(y)
        return jnp.concatenate([y[:, : self.start], rows, y[:, end:]], axis=1)

    def _within(self, y: jax.Array, rows: jax.Array, room: Opened) -> jax.Array:
        if self.placeholder not in room.places:
            raise self._no_room(y)
        nth = room.places[self.placeholder]
        nth = jnp.pad(nth, [(0, 0), (y.shape[1] - nth.shape[1], 0)], constant_values=-1) - self.start
        mine = (nth >= 0) & (nth < self.length)
        taken = jnp.take_along_axis(rows, jnp.clip(nth, 0, self.length - 1)[..., None], axis=1)
        return jnp.where(mine[..., None], taken, y)

    def _no_room(self, y: jax.Array) -> ValueError:
        return ValueError(
            f"A prompt of {self.length} embeddings has no room: the embedding was called with {y.shape[:-1]} ids, "
            "outside of the module that takes (batch, sequence) token ids. `within=` of `jpeft.prompt` names that "
            "module."
        )


class Prompt(SoftPrompt):
    """$P$ is what trains.

    Lester et al., [The Power of Scale for Parameter-Efficient Prompt Tuning](https://arxiv.org/abs/2104.08691), 2021.
    """

    rows: Trainable[jax.Array]  # (length, features)

    def prompt(self, tasks):
        return self.rows


@transform
def prompt(
    params: Params,
    *,
    length: int = 20,
    init: Literal["vocabulary", "noise"] | Sequence[int] | jax.Array = "vocabulary",
    placeholder: int | None = None,
    targets: Targets = TABLE,
    within: str = "",
    key: jax.Array | None = None,
) -> Params:
    """Put `length` trainable embeddings before every sequence, or into it. See `Prompt`.

    Before it, the model runs on `length` more positions; its masks, its positions and its outputs stay those of the
    tokens. A second prompt comes between the first and the tokens.

    **Arguments:**

    - `length`: how many.
    - `init`: `"vocabulary"`: those of random tokens; `"noise"`: normal, with the table's mean and standard deviation;
      the token ids of a text, repeated or cut to `length`; or the embeddings themselves, `(length, features)`.
    - `placeholder`: a token, which nothing else is written with. The embeddings take its places, one after the other,
      wherever a template has put it in the ids: before, between and after parts of the text. The token stays what it
      was where it occurs more often. A second prompt with the same one takes the places that follow.
    - `targets`: the table of token embeddings, by default found by its usual names.
    - `within`: the path of the module that takes the token ids and the mask, by default the model itself. Name the
      encoder where a head pools its output by the mask.
    - `key`: for `init`; `jax.random.key(0)` if left out.

    **Raises** `ValueError` if there is not one table, if `init` or `placeholder` does not fit it, and, when the model
    is called, if it has no room for the prompt.
    """
    how = {"length": length, "init": init, "placeholder": placeholder, "targets": targets, "within": within, "key": key}
    return put_prompt(params, lambda rows: Prompt(rows=rows), **how)


def put_prompt(
    params: Params,
    new: Callable[[jax.Array], SoftPrompt],
    *,
    length: int,
    init: Any,
    placeholder: int | None = None,
    targets: Targets,
    within: str,
    key: jax.Array | None,
    tasks: bool = False,
) -> Params:
    """`prompt`, with the node that `new(rows)` makes; `tasks` tells whether calls say what tasks they are of."""
    leaves = named_leaves(params)
    tables = list(select(targets, leaves))
    if len(tables) != 1:
        raise ValueError(f"Which is the table of token embeddings? `targets` matches {tables}.")
    table = value(leaves[tables[0]])
    rows = _rows(table, length, init, default(key))
    if placeholder is not None and not 0 <= placeholder < len(table):
        raise ValueError(f"`placeholder` is {placeholder}: it must be a token of the table's {len(table)}.")
    inside = {n: x for n, x in leaves.items() if not within or n.startswith(f"{within}/")}
    if tables[0] not in inside:
        raise no_match([within], sorted({n.rpartition("/")[0] for n in leaves}), "module around the embedding")
    owner = tables[0].rpartition("/")[0]
    before = (x for x in modules(params)[owner].values() if isinstance(x, SoftPrompt) and x.placeholder == placeholder)
    start = sum(x.length for x in before)
    params = place(params, {owner: new(rows).replace(length=length, start=start, placeholder=placeholder)}, "prompt")
    if placeholder is not None:
        template = Template(placeholder=placeholder, length=start + length, tasks=tasks)
        return place(params, {within: template}, "prompt_template")
    limit = min(positions(inside).values(), default=None)
    return place(params, {within: Room(length=length, limit=limit, tasks=tasks)}, "prompt_room")


def _rows(table: jax.Array, length: int, init: Any, key: jax.Array) -> jax.Array:
    if length < 1:
        raise ValueError(f"A prompt has at least one embedding, not {length}.")
    if isinstance(init, str):
        if init == "vocabulary":
            return jax.random.choice(key, table, (length,), replace=length > table.shape[0])
        if init == "noise":
            exact = table.astype(jnp.float32)
            noise = jax.random.normal(key, (length, table.shape[1]))
            return (jnp.mean(exact) + jnp.std(exact) * noise).astype(table.dtype)
        raise ValueError(f"`init` is {init!r}: 'vocabulary', 'noise', token ids, or embeddings.")
    init = jnp.asarray(init)
    if jnp.issubdtype(init.dtype, jnp.integer) and init.ndim == 1 and init.size:
        if int(init.min()) < 0 or int(init.max()) >= table.shape[0]:
            raise ValueError(f"`init` has token ids outside of the table's {table.shape[0]}.")
        return table[jnp.resize(init, length)]
    if init.shape != (length, table.shape[1]):
        raise ValueError(f"`init` has shape {init.shape}: token ids (n,), or embeddings {(length, table.shape[1])}.")
    return init.astype(table.dtype)
