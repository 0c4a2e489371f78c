"""Prefix tuning: trainable keys and values before those of the tokens, in every layer."""

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from .._node import Additive, Static
from .._targets import Call, Sites, Targets, named_leaves, select
from .._tree import Params, default, place, transform
from ..models._masks import default_positions
from ..places import KEYS_AND_VALUES
from ._prefix_nodes import Prefix, Prefixed, projected
from ._room import check_limit, positions


class Shift(Additive):
    """Position ids move up by `length`: at the table of positions, or else in the call of the model."""

    innermost = True  # the position ids are those of the prompts, too

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


@transform
def prefix(
    params: Params,
    *,
    length: int = 20,
    init: Literal["normal", "zeros"] = "normal",
    width: int | None = None,
    targets: Targets = KEYS_AND_VALUES,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Put `length` trainable keys and values before those of every attention. See `Prefix`.

    The positions of the tokens move up by `length`.

    **Arguments:**

    - `length`: how many.
    - `init`: `"normal"`: of deviation 1; `"zeros"`. Neither is the model as it was. `init_prefix` starts from a text.
      With `width` it is of the network's last layer: as torch's linear layers start, or zeros.
    - `width`: of the hidden layer of a network that makes the prefix while it trains. See `ProjectedPrefix`. `collapse`
      leaves the prefix alone.
    - `targets`: paths of the modules that keys and values pass through, by default `kv` of all attention: that of an
      encoder, of a decoder and between them have each their own, and each a network of its own.
    - `sites`: has the shapes of keys and values. It must be given.
    - `key`: for `init`; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for a length or a width below one, an unknown `init`, and targets that match no module of
    `sites`.
    """
    if length < 1 or (width is not None and width < 1) or init not in ("normal", "zeros"):
        raise ValueError(
            f"A prefix of at least 1, and a network of at least 1, start 'normal' or as 'zeros', not {length=}, "
            f"{width=} and {init=}."
        )
    found, key = where_keys_pass(targets, sites), default(key)
    if width is None:
        nodes = {}
        for (path, call), k in zip(found.items(), jax.random.split(key, len(found)), strict=True):
            shape = (2, *call.stack, length, *call.shape[2:])
            keys, values = jax.random.normal(k, shape) if init == "normal" else jnp.zeros(shape)
            nodes[path] = Prefix(keys=keys, values=values)
    else:
        params, nodes = projected(params, found, length, width, init == "zeros", key)
    return put_prefix(params, nodes, length)


def where_keys_pass(targets: Targets, sites: Sites | None) -> dict[str, Call]:
    """What the targeted modules are called with. **Raises** `ValueError` for those that are not of keys and values."""
    found = called(targets, sites)
    others = {path: call.shape for path, call in found.items() if len(call.shape) != 4}
    if others:
        raise ValueError(f"Prefixes are for modules called with (batch, keys, heads, width), not for these: {others}")
    return found


def called(targets: Targets, sites: Sites | None) -> dict[str, Call]:
    """What the targeted modules are called with. **Raises** `ValueError` where nothing tells that."""
    if sites is None:
        raise ValueError(
            "What are the modules called with, as how many heads of keys, how wide? Let the model tell:\n"
            '  sites = jpeft.sites(model, {"params": params}, *example_inputs)   # then pass sites=sites'
        )
    found = {path: sites.modules[path] for path in select(targets, sites.modules, "module")}
    if others := [path for path, call in found.items() if call.stack is None]:
        raise ValueError(f"These modules are stacked over other axes than their first: {others}")
    return found


def put_prefix(params: Params, nodes: Mapping[str, Prefixed], length: int) -> Params:
    """The tree with prefixes at the paths of `nodes`, and with position ids that leave room for them."""
    tables = {n: size for n, size in positions(named_leaves(params)).items() if n.endswith("/embedding")}
    shifts = {n.rpartition("/")[0]: Shift(length=length, limit=size) for n, size in tables.items()}
    return place(place(params, nodes, "prefix"), shifts or {"": Shift(length=length)}, "prefix_shift")
