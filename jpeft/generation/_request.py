"""What a call of `generate` asks for: its arguments, checked, and in the form that the compiled functions take."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from .._node import Node
from .._tree import Params, default
from ..additive._prefix import Shift
from ..additive._room import Room
from ._decoding import Constants, Prompt, encodes
from ._sampling import Sampling


class Request(NamedTuple):
    """Arguments that are in order."""

    model: nn.Module
    constants: Constants
    prompt: Prompt
    slots: int
    count: int
    tokenizer: Any
    stop_strings: Sequence[str]


def request(
    model: nn.Module,
    params: Params,
    input_ids: Any,
    attention_mask: Any,
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    stop_strings: Sequence[str],
    tokenizer: Any,
    pad_token: int | None,
    key: jax.Array | None,
    pad_to_multiple_of: int,
    cache_length: int | None,
    task_ids: Any,
    **sampling: Any,
) -> Request:
    """Raises a ValueError with all that is wrong with the arguments of `generate`."""
    ids = np.asarray(input_ids)
    mask = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask) != 0
    faults = [*_faults_of_prompts(model, ids, mask), *faults_of_sampling(**sampling)]
    for name, number in (("max_new_tokens", max_new_tokens), ("pad_to_multiple_of", pad_to_multiple_of)):
        if not isinstance(number, int | np.integer) or number < 1:
            faults.append(f"`{name}` is {number}: an integer, 1 or more")
    given = [*np.ravel(stop_tokens), *([] if pad_token is None else [pad_token])]
    if np.ndim(stop_tokens) != 1 or not all(isinstance(n, int | np.integer) and 0 <= n < 2**31 for n in given):
        faults.append(f"`stop_tokens` is {stop_tokens} and `pad_token` {pad_token}: a sequence of token ids, and one")
    if isinstance(stop_strings, str) or not all(stop_strings):
        faults.append(f"`stop_strings` is {stop_strings!r}: a sequence of strings, none of them empty")
    tasks = None if task_ids is None else np.asarray(task_ids)
    if tasks is not None and (tasks.shape != ids.shape[:1] or not np.issubdtype(tasks.dtype, np.integer)):
        faults.append(f"`task_ids` are {tasks.dtype} {tasks.shape}, for {ids.shape[:1]} rows: an integer for each")
    if stop_strings and tokenizer is None:
        faults.append("`stop_strings` are looked for in the text, and there is no `tokenizer` to make it")
    _raise(faults)

    source = {}
    longest, multiple = int(mask.sum(axis=1).max()), pad_to_multiple_of
    if encodes(model):
        ids, mask = _aligned(ids, mask, -(-longest // multiple) * multiple, left=False)
        source = {"input_ids": ids, "attention_mask": mask}
        ids = np.full((len(ids), 1), model.config.decoder_start_token_id)
        mask, longest, multiple = np.ones(ids.shape, bool), 1, 1
    seq = -(-max(longest, 2) // multiple) * multiple
    slots = seq + max_new_tokens - 1 if cache_length is None else cache_length
    limit = getattr(model.config, "max_position_embeddings", None)
    before = _positions_before(params)
    if limit is not None and before + longest + max_new_tokens > limit:
        behind = f", behind {before} of prompts and prefixes," if before else ""
        text = f"{longest} tokens and {max_new_tokens} new ones{behind} are more than the model's {limit} positions"
        faults.append(text)
    if slots < seq + max_new_tokens - 1:
        faults.append(f"`cache_length` is {slots}: {seq} tokens and {max_new_tokens} new ones need more")
    _raise(faults)

    pad_token = (*stop_tokens, 0)[0] if pad_token is None else pad_token
    options = {} if tasks is None else {"task_ids": tasks.astype(np.int32)}
    constants = Constants(
        params, _sampling(**sampling), np.array(stop_tokens, np.int32), np.int32(pad_token), default(key), options
    )
    prompt = Prompt(*_aligned(ids, mask, seq, left=True), source)
    return Request(model, constants, prompt, slots, max_new_tokens, tokenizer, stop_strings)


def _positions_before(params: Params) -> int:
    """Those that prompts and prefixes take: no call of the model sees how long a text is to become."""
    nodes = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Node))
    return sum(node.length for node in nodes if isinstance(node, Room | Shift))


def _raise(faults: list[str]) -> None:
    if faults:
        raise ValueError("\n  ".join(["Nothing can be generated:", *faults]))


def _faults_of_prompts(model: nn.Module, ids: np.ndarray, mask: np.ndarray) -> Iterator[str]:
    if not hasattr(model, "init_cache"):
        yield f"{type(model).__name__} has no `init_cache`: a model that makes tokens is needed, as `models.Decoder`"
    if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        yield f"`input_ids` are {ids.dtype} {ids.shape}: integers (batch, seq), and at least one"
    elif mask.shape != ids.shape:
        yield f"`attention_mask` is {mask.shape}, and `input_ids` are {ids.shape}"
    else:
        if empty := np.flatnonzero(~mask.any(axis=1)).tolist():
            yield f"rows of padding alone: {empty}. There is nothing to continue; leave them out"
        vocabulary = model.config.vocab_size
        if outside := np.unique(ids[mask & ((ids < 0) | (ids >= vocabulary))]).tolist():
            yield f"tokens that the model's vocabulary of {vocabulary} does not have: {outside}"


def faults_of_sampling(
    temperature: float, top_k: int | None, top_p: float | None, min_p: float | None, repetition_penalty: float | None
) -> Iterator[str]:
    """What is wrong with these options of `generate`."""
    if not 0 <= temperature < math.inf:
        yield f"`temperature` is {temperature}: 0, which takes the most probable tokens, or more"
    filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    if temperature == 0 and (given := [f"`{name}`" for name, x in filters.items() if x is not None]):
        yield f"{', '.join(given)}: nothing is left to chance without a `temperature` above 0"
    if top_k is not None and top_k < 1:
        yield f"`top_k` is {top_k}: 1 or more"
    if top_p is not None and not 0 < top_p <= 1:
        yield f"`top_p` is {top_p}: above 0, and 1 at most"
    if min_p is not None and not 0 <= min_p <= 1:
        yield f"`min_p` is {min_p}: from 0 to 1"
    if repetition_penalty is not None and not 0 < repetition_penalty < math.inf:
        yield f"`repetition_penalty` is {repetition_penalty}: above 0"


def _sampling(temperature: float, top_k: int | None, **numbers: float | None) -> Sampling:
    """Numbers of one type each, so that others do not make another trace."""
    numbers |= {"temperature": temperature or None}
    numbers = {name: None if x is None else np.float32(x) for name, x in numbers.items()}
    return Sampling(top_k=None if top_k is None else np.int32(top_k), **numbers)


def _aligned(ids: np.ndarray, mask: np.ndarray, length: int, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of every row together, with padding on one side only, up to `length`."""
    order = np.argsort(mask if left else ~mask, axis=1, kind="stable")
    ids, mask = (np.take_along_axis(x, order, axis=1) for x in (np.where(mask, ids, 0), mask))
    short = max(length - ids.shape[1], 0)
    widths = ((0, 0), (short, 0) if left else (0, short))
    ids, mask = np.pad(ids.astype(np.int32), widths), np.pad(mask, widths)
    return (ids[:, -length:], mask[:, -length:]) if left else (ids[:, :length], mask[:, :length])
