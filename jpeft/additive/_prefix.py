"""Prefix tuning: trainable keys and values before those of the tokens, in every layer."""

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from .._apply import apply
from .._apply import sites as sites_of
from .._node import Additive, Static, Trainable, widened
from .._targets import Call, Sites, Targets, named_leaves, select
from .._tree import Params, default, place, transform
from ..models._masks import default_positions
from ._room import check_limit, positions


class Prefix(Additive):
    r"""$K' = [P_K; K]$ and $V' = [P_V; V]$, seen by every query; they are not rotated.

    Stands beside a module without parameters that attention passes its keys, values and mask through.
    Li and Liang, [Prefix-Tuning: Optimizing Continuous Prompts for Generation](https://arxiv.org/abs/2101.00190), ACL
    2021; at every layer without a reparametrization, [P-tuning v2](https://arxiv.org/abs/2110.07602), 2022.
    """

    keys: Trainable[jax.Array, "length heads width"]
    values: Trainable[jax.Array, "length heads width"]

    def output(self, y, *args):
        key, value, mask = y  # (batch, keys, heads, width) twice, and (batch or 1, heads or 1, queries, keys)
        before = lambda p, x: jnp.concatenate([jnp.broadcast_to(p.astype(x.dtype), (len(x), *p.shape)), x], axis=1)
        if mask is not None:
            seen = mask.dtype == bool  # a mask of numbers is added to scores
            mask = jnp.pad(mask, [(0, 0)] * 3 + [(len(self.keys), 0)], constant_values=seen)
        return before(self.keys, key), before(self.values, value), mask


class Shift(Additive):
    """Position ids move up by `length`: at the table of positions, or else in the call of the model."""

    length: Static[int]
    limit: Static[int | None] = None  # the positions of the table that this stands beside

    def around(self, call, key, *args, **kwargs):
        if self.limit is not None:
            (ids,) = args
            check_limit(ids.shape[1], self.length, self.limit)
            return call(ids + self.length, **kwargs)
        given = inspect.signature(call).bind(*args, **kwargs)
        if "position_ids" in given.signature.parameters:
            given.arguments["position_ids"] = self.length + _positions(given.arguments)
        return call(*given.args, **given.kwargs)


def _positions(arguments: Mapping[str, Any]) -> jax.Array:
    """The position ids that a model is called with, or else those that it would take by itself."""
    given, segments, cache = (arguments.get(name) for name in ("position_ids", "segment_ids", "cache"))
    if given is not None:
        return given
    ids = next(x for x in arguments.values() if getattr(x, "ndim", 0) == 2)
    return default_positions(ids.shape[1], segments, cache)


ATTENTION = r"(.*/)?(attention|self_attention|self_attn|attn)/kv"


@transform
def prefix(
    params: Params,
    *,
    length: int = 20,
    init: Literal["normal", "zeros"] = "normal",
    targets: Targets = ATTENTION,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Put `length` trainable keys and values before those of every layer. See `Prefix`.

    The positions of the tokens move up by `length`.

    **Arguments:**

    - `length`: how many.
    - `init`: `"normal"`: of deviation 1; `"zeros"`. Neither is the model as it was. `init_prefix` starts from a text.
    - `targets`: paths of the modules that keys and values pass through, by default `kv` of all self-attention.
    - `sites`: has the shapes of keys and values. It must be given.
    - `key`: for `init`; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for a length below one, an unknown `init`, and targets that match no module of `sites`.
    """
    if length < 1 or init not in ("normal", "zeros"):
        raise ValueError(f"A prefix of at least 1 starts 'normal' or as 'zeros', not {length=} and {init=}.")
    found = _places(targets, sites)
    nodes = {}
    for (path, call), k in zip(found.items(), jax.random.split(default(key), len(found)), strict=True):
        shape = (2, *call.stack, length, *call.shape[2:])
        nodes[path] = Prefix(**_named(jax.random.normal(k, shape) if init == "normal" else jnp.zeros(shape)))
    return put_prefix(params, nodes, length)


def _named(both: jax.Array) -> dict[str, jax.Array]:
    return dict(zip(("keys", "values"), both, strict=True))


def _places(targets: Targets, sites: Sites | None) -> dict[str, Call]:
    if sites is None:
        raise ValueError(
            "How many heads do the keys have, and how wide are they? Let the model tell:\n"
            '  sites = jpeft.sites(model, {"params": params}, *example_inputs)   # then pass sites=sites'
        )
    found = {path: sites.modules[path] for path in select(targets, sites.modules, "module")}
    others = {path: call.shape for path, call in found.items() if len(call.shape) != 4 or call.stack is None}
    if others:
        raise ValueError(f"Prefixes are for modules called with (batch, keys, heads, width), not for these: {others}")
    return found


def put_prefix(params: Params, nodes: Mapping[str, Prefix], length: int) -> Params:
    """The tree with prefixes at the paths of `nodes`, and with position ids that leave room for them."""
    tables = {n: size for n, size in positions(named_leaves(params)).items() if n.endswith("/embedding")}
    shifts = {n.rpartition("/")[0]: Shift(length=length, limit=size) for n, size in tables.items()}
    return place(place(params, nodes, "prefix"), shifts or {"": Shift(length=length)}, "prefix_shift")


def init_prefix(model: nn.Module, params: Params, input_ids: jax.Array, *, targets: Targets = ATTENTION) -> Params:
    """`prefix` that starts as the keys and values that the model has of a text: as if the text stood before the tokens.

    **Arguments:**

    - `model`: a decoder that has `init_cache`.
    - `input_ids`: of the text, `(length,)`. It is not padded.
    - `targets`: as for `prefix`.
    """
    ids = jnp.asarray(input_ids)[None]
    sites = sites_of(model, {"params": params}, ids)
    layers = [path for path in sites.modules if path.endswith("/kv")]
    _, cache = apply(model, {"params": params}, ids, cache=model.init_cache(1, ids.shape[1]))
    both = widened(jnp.stack([cache.keys, cache.values])[:, :, 0])  # (2, layers, length, heads, width)
    of = lambda path, call: both if call.stack else both[:, layers.index(path)]
    nodes = {path: Prefix(**_named(of(path, call))) for path, call in _places(targets, sites).items()}
    return put_prefix(params, nodes, both.shape[2])
