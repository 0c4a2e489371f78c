"""Attention in any model: its keys and values pass through a place that nodes can stand beside."""

import contextvars
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ._context import setting
from .models._attention import KeysAndValues


# What functions make of positions by themselves, by the names that JAX and others have for it.
UNSEEN = ("is_causal", "causal", "local_window_size", "query_seq_lengths", "key_value_seq_lengths", "segment_ids")

# The modules whose calls have begun and not ended, the innermost last.
_active: contextvars.ContextVar[Sequence[nn.Module]] = contextvars.ContextVar("active", default=())
at_work = functools.partial(setting, _active)


def keys_and_values(attend: Callable, *, name: str = "kv") -> Callable:
    """`attend`, whose keys and values pass through the place `name` of the Flax module that calls it.

    It makes methods that change keys and values, as `prefix` does, reach a model's own attention. By itself, and
    wherever no node is there, it computes what `attend` does. `nn.MultiHeadDotProductAttention` has the place already.

        attend = jpeft.keys_and_values(jax.nn.dot_product_attention)

    **Arguments:**

    - `attend`: has arguments `key` and `value`, `(batch, keys, heads, width)`. If it has a `mask`,
      `(batch or 1, heads or 1, queries or 1, keys)`, what it is true for is seen, and a `bias` of such a shape is added
      to the scores. It must not be compiled around this function: `keys_and_values(jax.jit(attend))` is right.
    - `name`: of the place, another for each where a module attends more than once.

    **Raises** `ValueError`, when there are more keys than `attend` was given, for options such as `is_causal`, by which
    it would take them for tokens.
    """
    signature = inspect.signature(attend)

    @functools.wraps(attend)
    def passed(*args, **kwargs):
        if not _active.get():
            return attend(*args, **kwargs)
        given = signature.bind(*args, **kwargs)
        given.arguments |= _through(name, given.arguments)
        return attend(*given.args, **given.kwargs)

    passed.place = name
    return passed


def _through(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments that the place `name` of the innermost module changes."""
    scope = _active.get()[-1].scope.push(name, reuse=True)
    mask, bias = given.get("mask"), given.get("bias")
    mask = None if mask is None else mask.astype(bool)
    key, value, mask = KeysAndValues(parent=scope, name=name)(given["key"], given["value"], mask)
    if key is given["key"] and value is given["value"]:
        return {}
    changed = {"key": key, "value": value}
    if more := key.shape[1] - given["key"].shape[1]:
        if wrong := [option for option in UNSEEN if given.get(option) not in (None, False)]:
            raise ValueError(
                f"{more} keys come before those of the tokens in {'/'.join(scope.path)!r}, which {', '.join(wrong)} of "
                "the function that attends would take for tokens: give it a mask instead."
            )
        if bias is not None:
            changed["bias"] = jnp.pad(bias, [(0, 0)] * (bias.ndim - 1) + [(more, 0)])
    return changed if mask is None else changed | {"mask": mask}


def passing(module: nn.Module) -> dict[str, Any]:
    """The fields of `module` that change, for its keys and values to pass through a place of it: Flax's attention's."""
    if not isinstance(module, nn.MultiHeadDotProductAttention) or hasattr(module.attention_fn, "place"):
        return {}
    return {"attention_fn": keys_and_values(module.attention_fn)}
