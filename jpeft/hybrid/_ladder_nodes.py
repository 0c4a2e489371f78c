"""The nodes of LST: a narrow network beside a model reads what the model's layers return."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from .._merge import beside
from .._node import Additive, Frozen, Static, Trainable, cast, is_node, value
from .._targets import TABLE, name_of, named_leaves
from .._tree import Params, modules, place
from ..models._cache import Cache
from ..places import BLOCK
from ._narrow import narrowed


class Fed(Additive):
    r"""The part of a side network that is fed by the model: $s D + d$, with `source` $s$ set in a call."""

    down: Trainable[jax.Array, "in width"]
    down_bias: Trainable[jax.Array, "width"]
    source: Frozen[Any] = None

    def read(self, x: jax.Array) -> jax.Array:
        """x (..., in), to which no gradient goes -> (..., width)."""
        y = jax.lax.stop_gradient(x) @ self.down
        return y + jnp.broadcast_to(self.down_bias, y.shape)


class LadderStart(Fed):
    """Beside the side network's table of embeddings, in whose place that of the model is read, the `source`."""

    def around(self, call, key, ids):
        return self.read(jnp.take(self.source, ids, axis=0).astype(self.down.dtype))


class Rung(Fed):
    r"""Beside a side block, which is called with $\mu h + (1 - \mu)\,(s D + d)$, where $\mu = \sigma(\alpha / 0.1)$.

    $h$ is of the side network, and $s$, the `source`, what the model's block of the same path returns.
    """

    gate: Trainable[jax.Array, ""]

    def inputs(self, h, *args):
        mu = jax.nn.sigmoid(self.gate / 0.1).astype(h.dtype)
        tap = self.source[:, self.source.shape[1] - h.shape[1] :]  # without a prompt before the tokens
        return mu * h + (1 - mu) * self.read(tap).astype(h.dtype), *args


class Seen(Additive):
    """`see(module, y)` in place of what a module returns. It is put into a tree for one call."""

    see: Static[Callable]

    def around(self, call, key, *args, **kwargs):
        return self.see(_module(call), call(*args, **kwargs))


@struct.dataclass
class LadderCache:
    """The caches of a model and of its side network."""

    model: Any
    side: Any

    @property
    def filled(self) -> bool:
        """Whether a call has written to it."""
        return self.model.filled

    @property
    def end(self) -> jax.Array:
        """The next free slot."""
        return self.model.end


class Ladder(Additive):
    r"""Stands beside a model whose last hidden states become $h U + u$, where $h$ are those of a side network.

    The side network is the same model, `reduction` times narrower; the `LadderStart` and the `Rung`s in it are fed by
    the model. Of the model itself nothing else is used but what comes after `outlet`, whose result is replaced.

    Sung et al., [LST: Ladder Side-Tuning](https://arxiv.org/abs/2206.06522), NeurIPS 2022.
    """

    side: Trainable[Any]  # its parameters
    up: Trainable[jax.Array, "width out"]
    up_bias: Trainable[jax.Array, "out"]
    reduction: Static[int]
    outlet: Static[str]  # the path of the module that returns the last hidden states
    absent: Static[tuple[tuple[str, tuple[int, ...]], ...]]  # parameters, with shapes, of which nothing is used

    def around(self, call, key, *args, **kwargs):
        model, given = _module(call), inspect.signature(call).bind(*args, **kwargs)
        own, side = _inner(model.variables["params"]), narrowed(model, self.reduction)
        cache, results = given.arguments.get("cache"), []
        if cache is not None and not isinstance(cache, LadderCache):
            cache = LadderCache(cache, _empty(side, cache))

        def with_cache(which):
            if cache is not None:
                given.arguments["cache"] = which
            return given

        def tap(module, y):
            module.sow("intermediates", "tap", _first(y))
            return y

        def replace(module, y):
            taps = {path.rpartition("/tap")[0]: x for path, x in _flat(_root(module)["intermediates"])}
            h, result = self._run(side, own, taps, with_cache(cache and cache.side))
            results.append(result)
            was = _first(y)
            z = h @ self.up.astype(h.dtype)
            z = (z + jnp.broadcast_to(self.up_bias.astype(h.dtype), z.shape)).astype(was.dtype)
            z = jnp.pad(z, [(0, 0), (was.shape[1] - z.shape[1], 0), (0, 0)])  # behind a prompt of the model's
            return (z, *y[1:]) if isinstance(y, tuple) else z

        blocks = [path for path in modules(own) if re.fullmatch(BLOCK, path)]
        seen = place(own, dict.fromkeys(blocks, Seen(see=tap)), "seen")
        seen = place(seen, {self.outlet: Seen(see=replace)}, "seen")
        rngs = {name: rng.as_jax_rng() for name, rng in model.scope.rngs.items()}
        alone, given = model.clone(parent=None, name=None), with_cache(cache and cache.model)
        y, _ = alone.apply({"params": seen}, *given.args, **given.kwargs, rngs=rngs, mutable=["intermediates"])
        return y if cache is None else (*y[:-1], LadderCache(y[-1], results[0][-1]))

    def _run(self, side: nn.Module, own: Params, taps: Mapping[str, jax.Array], given: Any) -> tuple[jax.Array, Any]:
        """The last hidden states of the side network, and what it returns."""
        dtype, reached = next(iter(taps.values())).dtype, []
        tables = {name.rpartition("/")[0]: x for name, x in named_leaves(own).items() if re.fullmatch(TABLE, name)}
        sources = taps | {path: value(x) for path, x in tables.items()}

        def feed(path, x):
            return x.replace(source=sources.get(name_of(path[:-1]))) if isinstance(x, Fed) else x

        def keep(module, y):
            reached.append(_first(y))
            return y

        tree = jax.tree_util.tree_map_with_path(feed, cast(self.side, dtype), is_leaf=is_node)
        for name, shape in self.absent:
            tree = put(tree, name, jnp.zeros(shape, dtype))
        tree = place(tree, {self.outlet: Seen(see=keep)}, "seen")
        known = inspect.signature(type(side).__call__).parameters
        options = {name: x for name, x in given.kwargs.items() if name in known}  # others are for nodes in the model
        result = side.apply({"params": tree}, *given.args, **options)
        return reached[0], result


def put(tree: Mapping[str, Any], name: str, x: Any) -> dict[str, Any]:
    """The tree with `x` at the path `name`."""
    head, _, rest = name.partition("/")
    return {**tree, head: put(tree.get(head, {}), rest, x) if rest else x}


def _module(call: Callable) -> nn.Module:
    """The module whose method is called."""
    return inspect.unwrap(call).args[0]


def _root(module: nn.Module) -> Mapping[str, Any]:
    """The variables of the model that a module is in."""
    while isinstance(module.parent, nn.Module):
        module = module.parent
    return module.variables


def _inner(params: Params) -> Params:
    """The tree without the ladder, and what was put around it."""
    names = [name for name, _ in beside(params)]
    first = next(n for n, name in enumerate(names) if isinstance(params[name], Ladder))
    return {name: x for name, x in params.items() if name not in names[first:]}


def _first(y: Any) -> jax.Array:
    """The hidden states among what a module returns."""
    y = y[0] if isinstance(y, tuple) else y
    if getattr(y, "ndim", 0) != 3:
        raise ValueError(
            f"A ladder needs hidden states (batch, seq, features) where this model has a {type(y).__name__} of shape "
            f"{getattr(y, 'shape', None)}: let `outlet` name the module that returns the last of them."
        )
    return y


def _flat(tree: Any) -> list[tuple[str, jax.Array]]:
    return [(name_of(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]


def _empty(side: nn.Module, cache: Any) -> Any:
    """A cache of the side network, for as many texts and tokens."""
    is_cache = lambda x: isinstance(x, Cache)
    one = next(x for x in jax.tree.leaves(cache, is_leaf=is_cache) if is_cache(x))
    return side.init_cache(*one.positions.shape, one.keys.dtype)
