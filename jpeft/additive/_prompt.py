"""Prompt tuning: trainable embeddings before those of the tokens."""

import abc
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from .._node import Additive, Static, Trainable, is_node, value
from .._targets import TABLE, Targets, named_leaves, no_match, select
from .._tree import Params, default, modules, place, transform
from ._room import Room, opened, positions


class SoftPrompt(Additive):
    """$E' = [P; E(ids)]$: stands beside the token embedding, in a model that a `Room` has given the positions."""

    rows: Trainable[jax.Array]  # (length, features)
    start: Static[int] = 0  # the position of the first: those of prompts that were there come before

    @abc.abstractmethod
    def prompt(self, tasks: jax.Array | None) -> jax.Array:
        """$P$, (length, features), or (batch, length, features) where it is one for every example's task."""

    def output(self, y, ids, *args):
        room, end = opened(), self.start + self.rows.shape[0]
        if room is not None and not room.is_before(ids):
            return y
        if room is None or room.length < end or y.ndim != 3 or y.shape[1] <= end:
            raise ValueError(
                f"A prompt of {self.rows.shape[0]} embeddings has no room: the embedding was called with "
                f"{y.shape[:-1]} ids, outside of the module that takes (batch, sequence) token ids. `within=` of "
                "`jpeft.prompt` names that module."
            )
        rows = self.prompt(room.tasks).astype(y.dtype)
        rows = jnp.broadcast_to(rows, (y.shape[0], *rows.shape[-2:]))
        return jnp.concatenate([y[:, : self.start], rows, y[:, end:]], axis=1)


class Prompt(SoftPrompt):
    """$P$ is what trains.

    Lester et al., [The Power of Scale for Parameter-Efficient Prompt Tuning](https://arxiv.org/abs/2104.08691), 2021.
    """

    def prompt(self, tasks):
        return self.rows


@transform
def prompt(
    params: Params,
    *,
    length: int = 20,
    init: Literal["vocabulary", "noise"] | Sequence[int] | jax.Array = "vocabulary",
    targets: Targets = TABLE,
    within: str = "",
    key: jax.Array | None = None,
) -> Params:
    """Put `length` trainable embeddings before every sequence. See `Prompt`.

    The model runs on `length` more positions; its masks, its positions and its outputs stay those of the tokens.
    A second prompt comes between the first and the tokens.

    **Arguments:**

    - `length`: how many.
    - `init`: `"vocabulary"`: those of random tokens; `"noise"`: normal, with the table's mean and standard deviation;
      the token ids of a text, repeated or cut to `length`; or the embeddings themselves, `(length, features)`.
    - `targets`: the table of token embeddings, by default found by its usual names.
    - `within`: the path of the module that takes the token ids and the mask, by default the model itself. Name the
      encoder where a head pools its output by the mask.
    - `key`: for `init`; `jax.random.key(0)` if left out.

    **Raises** `ValueError` if there is not one table, if `init` does not fit it, and, when the model is called, if it
    has no room for the prompt.
    """
    new = lambda rows: Prompt(rows=rows)
    return put_prompt(params, new, length=length, init=init, targets=targets, within=within, key=key)


def collapse(params: Params, *, task: int | None = None) -> Params:
    """The tree with every prompt as the embeddings that it comes to: a `Prompt` without the network or the factors.

    **Arguments:**

    - `task`: whose, of prompts that are one for every task.
    """

    def plain(x):
        if not isinstance(x, SoftPrompt):
            return x
        rows = x.prompt(None if task is None else jnp.array([task]))
        return Prompt(rows=rows.reshape(rows.shape[-2:]), start=x.start)

    return jax.tree.map(plain, params, is_leaf=is_node)


def put_prompt(
    params: Params,
    new: Callable[[jax.Array], SoftPrompt],
    *,
    length: int,
    init: Any,
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
    rows = _rows(value(leaves[tables[0]]), length, init, default(key))
    inside = {n: x for n, x in leaves.items() if not within or n.startswith(f"{within}/")}
    if tables[0] not in inside:
        raise no_match([within], sorted({n.rpartition("/")[0] for n in leaves}), "module around the embedding")
    limit = min(positions(inside).values(), default=None)
    owner = tables[0].rpartition("/")[0]
    start = sum(x.rows.shape[0] for x in modules(params)[owner].values() if isinstance(x, SoftPrompt))
    params = place(params, {owner: new(rows).replace(start=start)}, "prompt")
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
