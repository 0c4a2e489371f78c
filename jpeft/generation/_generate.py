"""New tokens from a causal or an encoder-decoder model, with the nodes at work."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from .._tree import Params
from . import _decoding
from ._request import Request, request
from ._text import Text, decoder, until


class Generated(NamedTuple):
    """What `generate` returns.

    **Fields:**

    - `tokens`: the new tokens, int32 `(batch, max_new_tokens)`, `pad_token` after a row's end.
    - `lengths`: how many of them are a row's, the stop token included, int32 `(batch,)`.
    - `text`: every row's text, without special tokens, and without the stop token or string that ended it; `None`
      without a tokenizer.
    """

    tokens: jax.Array | np.ndarray
    lengths: jax.Array | np.ndarray
    text: tuple[str, ...] | None


class Piece(NamedTuple):
    """What `stream` yields: a token of every row.

    **Fields:**

    - `tokens`: int32 `(batch,)`, `pad_token` in rows that had ended before.
    - `active`: bool `(batch,)`, the rows that had not.
    - `text`: what is new of every row's text; `None` without a tokenizer. Half of a character, and what a stop string
      may begin with, wait for the tokens that settle them.
    """

    tokens: np.ndarray
    active: np.ndarray
    text: tuple[str, ...] | None


def generate(
    model: nn.Module,
    params: Params,
    input_ids: Any,
    attention_mask: Any = None,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop_tokens: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    tokenizer: Any = None,
    pad_token: int | None = None,
    key: jax.Array | None = None,
    pad_to_multiple_of: int = 1,
    cache_length: int | None = None,
    task_ids: Any = None,
) -> Generated:
    """Continue every row of `input_ids`, with the most probable tokens or, given a `temperature`, by chance.

    What reads the prompts and what makes the tokens are compiled once for each shape: the number of rows, the longest
    prompt and `max_new_tokens`. Another number, such as another temperature, compiles nothing. The loop over tokens
    runs on the device, unless there are stop strings, and ends with the last row.

    **Arguments:**

    - `model`: a `models.Decoder`, or an encoder-decoder, whose encoder reads the prompts.
    - `params`: its parameters, with nodes of any kind.
    - `input_ids`, `attention_mask`: `(batch, seq)`, with padding on either side: a row's positions are those of its
      own tokens.
    - `max_new_tokens`: how many tokens a row gets at most.
    - `temperature`: divides the scores before a token is chosen by chance. 0: no chance.
    - `top_k`, `top_p`, `min_p`: rule out, one after the other, all but the `k` most probable tokens; all but the most
      probable that together have probability `p`; and those less probable than `p` times the most probable.
    - `repetition_penalty`: divides the positive scores of tokens that are in the row, and multiplies the negative ones.
    - `stop_tokens`: tokens that end a row.
    - `stop_strings`: strings that end a row once its new text has one, however tokens divide it.
    - `tokenizer`: of the library tokenizers or of transformers, for `stop_strings` and `text`.
    - `pad_token`: follows a row's end; the first stop token if left out, or 0.
    - `key`: `jax.random.key(0)` if left out: the same call then makes the same choices.
    - `pad_to_multiple_of`: lengthens the prompts, so that those of like lengths share what is compiled.
    - `cache_length`: how many tokens the model is to have room for, so that all prompts share the compiled loop; if
      left out, as many as this call needs.
    - `task_ids`: `(batch,)` integers, the tasks of the rows, where nodes ask for them: `MPT`, `Poly`.

    The numbers mean what they do in transformers, and work in its order. **Raises** `ValueError`, with every fault, for
    prompts and options that make no sense or contradict each other, and for more tokens than the model has positions.
    """
    asked = request(
        model, params, input_ids, attention_mask, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
        top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, stop_tokens=stop_tokens,
        stop_strings=stop_strings, tokenizer=tokenizer, pad_token=pad_token, key=key,
        pad_to_multiple_of=pad_to_multiple_of, cache_length=cache_length, task_ids=task_ids,
    )  # fmt: skip
    if stop_strings:
        pieces = list(_pieces(asked))
        tokens = np.full((len(pieces[0].tokens), max_new_tokens), asked.constants.pad_token)
        tokens[:, : len(pieces)] = np.stack([piece.tokens for piece in pieces], axis=1)
        lengths = np.sum([piece.active for piece in pieces], axis=0, dtype=np.int32)
    else:
        tokens, lengths, _ = _decoding.loop(model, asked.constants, _start(asked), count=max_new_tokens)
    if tokenizer is None:
        return Generated(tokens, lengths, None)
    rows = zip(np.asarray(tokens), np.asarray(lengths), strict=True)
    return Generated(tokens, lengths, tuple(_text(asked, row[:length]) for row, length in rows))


def stream(
    model: nn.Module, params: Params, input_ids: Any, attention_mask: Any = None, **options: Any
) -> Iterator[Piece]:
    """The tokens that `generate` makes of the same arguments, one by one as they come.

    **Raises** as it does, when it is called.
    """
    return _pieces(request(model, params, input_ids, attention_mask, **(generate.__kwdefaults__ | options)))


def _start(asked: Request) -> _decoding.State:
    params, sampling, *_, options = asked.constants
    penalty = sampling.repetition_penalty is not None
    return _decoding.start(asked.model, params, asked.prompt, options, slots=asked.slots, penalty=penalty)


def _pieces(asked: Request) -> Iterator[Piece]:
    state = _start(asked)
    done = np.zeros(len(state.tokens), bool)
    decode = asked.tokenizer and decoder(asked.tokenizer)
    texts = [Text(decode, asked.stop_strings) for _ in done] if decode else None
    for n in range(asked.count):
        state = _decoding.step(asked.model, asked.constants, state._replace(done=done))
        tokens, active = np.asarray(state.tokens), ~done
        stops = np.isin(tokens, asked.constants.stop_tokens)
        done = done | stops | (n + 1 == asked.count)
        if texts is None:
            shown = None
        else:
            rows = zip(texts, tokens, active & ~stops, active & done, strict=True)
            shown = tuple(_shown(*row) for row in rows)
            done |= [text.stopped for text in texts]
        yield Piece(tokens, active, shown)
        if done.all():
            return


def _shown(text: Text, token: int, goes_on: bool, ends: bool) -> str:
    new = text.add(token) if goes_on else ""
    return new + text.end() if ends else new


def _text(asked: Request, tokens: np.ndarray) -> str:
    if len(tokens) and tokens[-1] in asked.constants.stop_tokens:
        tokens = tokens[:-1]
    return until(decoder(asked.tokenizer)(tokens), asked.stop_strings)
