"""The compiled part of generation: read the prompts, then choose a token and let the model read it, again and again."""

import inspect
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from .._apply import apply
from .._tree import Params
from ..additive._positions import NONE, Ranks, ranks_of, told
from ._sampling import Sampling, choose


class Constants(NamedTuple):
    """What a step needs and does not change."""

    params: Params
    sampling: Sampling
    stop_tokens: Array  # (any number,)
    pad_token: Array
    key: Array
    options: dict[str, Array]  # of every call of the model: `task_ids`


class Prompt(NamedTuple):
    """What the rows begin with, padded on the left to two tokens or more: what is read at once, and the last."""

    ids: Array  # (batch, seq)
    mask: Array  # bool
    source: dict[str, Array]  # what an encoder reads, as the model calls it


class State(NamedTuple):
    """What a step changes."""

    cache: Any
    tokens: Array  # (batch,) the last of every row; the model has not read it
    positions: Array  # (batch,) of that token
    seen: Array | None  # (batch, vocab) bool, whether a row has a token, where there is a penalty
    done: Array  # (batch,) bool, whether a row has ended
    steps: Array  # how many were made


def encodes(model: nn.Module) -> bool:
    """Whether an encoder reads the prompts."""
    return "decoder_input_ids" in inspect.signature(type(model).__call__).parameters


@partial(jax.jit, static_argnames=("model", "slots", "penalty"))
def start(
    model: nn.Module, params: Params, prompt: Prompt, options: dict[str, Array], *, slots: int, penalty: bool
) -> State:
    """The model reads all but the last token of every row, into a cache of `slots` tokens."""
    ids, mask = prompt.ids, prompt.mask
    batch = len(ids)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    names = _arguments(model, ids[:, :-1], mask[:, :-1], positions[:, :-1]) | prompt.source | options
    # The logits are not used, and XLA does not compute them: those of a long prompt would take more than the model.
    with told(jax.tree.map(lambda x: x[:, :-1], ranks_of(mask))):
        logits, cache = apply(model, {"params": params}, **names, cache=model.init_cache(batch, slots))
    seen = None
    if penalty:
        seen = jnp.zeros((batch, logits.shape[-1]), bool).at[jnp.arange(batch)[:, None], ids].max(mask)
    return State(cache, ids[:, -1], positions[:, -1], seen, jnp.zeros(batch, bool), jnp.zeros((), jnp.int32))


def _arguments(model: nn.Module, ids: Array, mask: Array, positions: Array) -> dict[str, Array]:
    if encodes(model):
        return {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def _step(model: nn.Module, constants: Constants, state: State) -> State:
    """The next token of every row that has not ended."""
    ids = state.tokens[:, None]
    names = _arguments(model, ids, jnp.ones_like(ids, bool), state.positions[:, None]) | constants.options
    # The first of them is the prompt's last: what comes before it is as many as its position, and behind it nothing.
    ranks = Ranks(state.positions[:, None], jnp.zeros_like(ids))
    ranks = jax.tree.map(lambda x: jnp.where(state.steps == 0, x, NONE), ranks)
    # What only the prompt goes through, as an encoder and its adapters, is unused here.
    with told(ranks):
        logits, cache = apply(model, {"params": constants.params}, **names, cache=state.cache, allow_unused=True)
    key = jax.random.fold_in(constants.key, state.steps)
    tokens = choose(logits[:, -1], state.seen, constants.sampling, key)
    tokens = jnp.where(state.done, constants.pad_token, tokens)
    seen = None if state.seen is None else state.seen.at[jnp.arange(len(ids)), tokens].set(True)
    done = state.done | jnp.any(tokens[:, None] == constants.stop_tokens[None, :], axis=1)
    return State(cache, tokens, state.positions + 1, seen, done, state.steps + 1)


step = jax.jit(_step, static_argnames="model", donate_argnames="state")


@partial(jax.jit, static_argnames=("model", "count"), donate_argnames="state")
def loop(model: nn.Module, constants: Constants, state: State, *, count: int) -> tuple[Array, Array, State]:
    """Steps until all rows have ended, `count` at most: tokens (batch, count), and how many are a row's (batch,).

    The last state is returned as well, for a cache that is not returned could not be written to in place.
    """

    def body(carry):
        # Of parameters that depend on the step nothing is computed before the loop. There XLA would take the quantized
        # kernels out of their codes, all at once.
        params, (made, lengths, state) = jax.lax.optimization_barrier((constants.params, carry))
        new = _step(model, constants._replace(params=params), state)
        made = jax.lax.dynamic_update_index_in_dim(made, new.tokens, state.steps, axis=1)
        return made, jnp.where(state.done, lengths, lengths + 1), new

    batch = len(state.tokens)
    made = jnp.broadcast_to(constants.pad_token, (batch, count))
    going = lambda carry: (carry[2].steps < count) & ~jnp.all(carry[2].done)
    return jax.lax.while_loop(going, body, (made, jnp.zeros(batch, jnp.int32), state))
