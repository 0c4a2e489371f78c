"""Prompt tuning: trainable embeddings before those of the tokens."""

import contextvars
import inspect
import re
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from .._node import Additive, Static, Trainable, value
from .._targets import Targets, named_leaves, no_match, select
from .._tree import Params, default, modules, place, transform


_room = contextvars.ContextVar("room", default=0)  # how many positions the model around has been given


class Prompt(Additive):
    """$E' = [P; E(ids)]$: stands beside the token embedding, in a model that a `Room` has given the positions.

    Lester et al., [The Power of Scale for Parameter-Efficient Prompt Tuning](https://arxiv.org/abs/2104.08691), 2021.
    """

    rows: Trainable[jax.Array]  # (length, features)
    start: Static[int] = 0  # the position of the first: those of prompts that were there come before

    def output(self, y, *args):
        (length, features), end = self.rows.shape, self.start + self.rows.shape[0]
        if _room.get() < end or y.ndim != 3 or y.shape[1] <= end:
            raise ValueError(
                f"A prompt of {length} embeddings has no room: the embedding was called with {y.shape[:-1]} ids, "
                "outside of the module that takes (batch, sequence) token ids. `within=` of `jpeft.prompt` names that "
                "module."
            )
        rows = jnp.broadcast_to(self.rows.astype(y.dtype), (y.shape[0], length, features))
        return jnp.concatenate([y[:, : self.start], rows, y[:, end:]], axis=1)


class Room(Additive):
    """`length` positions before those of the tokens, in all that a model takes, and not in what it returns.

    Masks let them be attended to, position ids move up by `length`, type ids repeat the first token's. Of results,
    those that have the sequence as the second of three axes or more are cut back to the tokens.
    """

    length: Static[int]
    limit: Static[int | None] = None  # the most positions that the model has embeddings for

    def around(self, call, key, *args, **kwargs):
        given = inspect.signature(call).bind(*args, **kwargs)
        arrays = _arrays(given.arguments).values()
        ids = next((x for x in arrays if x.ndim == 2 and jnp.issubdtype(x.dtype, jnp.integer)), None)
        if ids is None:
            raise ValueError("A prompt stands before token ids (batch, sequence), and this model is called with none.")
        tokens, total = ids.shape[1], ids.shape[1] + self.length
        if self.limit is not None and total > self.limit:
            raise ValueError(
                f"{tokens} tokens and a prompt of {self.length} are {total} positions: the model has {self.limit}. "
                "Shorten the sequences or the prompt."
            )
        for name, x in _arrays(given.arguments).items():
            given.arguments[name] = _widen(name, x, tokens, self.length)
        token = _room.set(_room.get() + self.length)
        try:
            y = call(*given.args, **given.kwargs)
        finally:
            _room.reset(token)
        cut = lambda x: x[:, self.length :] if jnp.ndim(x) > 2 and x.shape[1] == total else x
        return jax.tree.map(cut, y)


def _arrays(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in arguments.items() if hasattr(x, "dtype") and hasattr(x, "ndim")}


def _widen(name: str, x: jax.Array, tokens: int, length: int) -> jax.Array:
    """An argument with `length` places before those of the tokens on each axis of theirs."""
    before = lambda axis: [(length if n == axis else 0, 0) for n in range(x.ndim)]
    if "mask" in name:
        attend = 0 if jnp.issubdtype(x.dtype, jnp.floating) and x.ndim > 2 else 1  # added to scores, or multiplied
        if x.ndim > 2 and x.shape[-2] == tokens:  # the prompt sees the prompt alone
            hidden = jnp.finfo(x.dtype).min if attend == 0 else 0
            x = jnp.pad(x, before(x.ndim - 2), constant_values=hidden)
        return jnp.pad(x, before(x.ndim - 1), constant_values=attend) if x.shape[-1] == tokens else x
    if x.ndim != 2 or x.shape[1] != tokens:
        if tokens in x.shape[1:]:
            raise ValueError(f"A prompt has no room in the argument {name!r} of shape {x.shape}: no mask and no ids.")
        return x
    if "position" in name:
        front = jnp.broadcast_to(jnp.arange(length, dtype=x.dtype)[None], (x.shape[0], length))
        return jnp.concatenate([front, x + length], axis=1)
    if name == "labels":
        return jnp.pad(x, before(1), constant_values=-100)
    return jnp.pad(x, before(1), mode="edge")


TABLE = (
    r"(.*/)?(word|word_embeddings|token|token_embed\w*|tok_embeddings|embed_tokens|embed|embedder|wte|shared)"
    r"/(embedding|input_embedding)"
)


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
    leaves = named_leaves(params)
    tables = list(select(targets, leaves))
    if len(tables) != 1:
        raise ValueError(f"Which is the table of token embeddings? `targets` matches {tables}.")
    table = value(leaves[tables[0]])
    rows = _rows(table, length, init, default(key))
    inside = [n for n in leaves if not within or n.startswith(f"{within}/")]
    if tables[0] not in inside:
        raise no_match([within], sorted({n.rpartition("/")[0] for n in leaves}), "module around the embedding")
    positions = [n for n in inside if re.search("position|wpe", n) and "relative" not in n]
    positions = [jax.eval_shape(value, leaves[n]).shape for n in positions]
    limit = min((shape[0] for shape in positions if len(shape) == 2), default=None)
    owner = tables[0].rpartition("/")[0]
    start = sum(x.rows.shape[0] for x in modules(params)[owner].values() if isinstance(x, Prompt))
    params = place(params, {owner: Prompt(rows=rows, start=start)}, "prompt")
    return place(params, {within: Room(length=length, limit=limit)}, "prompt_room")


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
