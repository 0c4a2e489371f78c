"""The prefixes of keys and values: as they train, or made by a network."""

import abc
import contextvars
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._context import setting
from .._node import Additive, Static, Trainable
from .._shared import Ref, share
from .._targets import Call
from .._tree import Params
from ..selective._unfreeze import Free
from ._ptuning import uniform


# Whether attention is to something by itself, as LLaMA-Adapter's prompt is: no prefix is before it.
_apart: contextvars.ContextVar[bool] = contextvars.ContextVar("apart", default=False)
apart = _apart.get
set_apart = functools.partial(setting, _apart)


class Prefixed(Additive):
    r"""$K' = [P_K; K]$ and $V' = [P_V; V]$, seen by every query; they are not rotated.

    Stands beside a module without parameters that attention passes its keys, values and mask through.
    """

    @abc.abstractmethod
    def pair(self) -> tuple[jax.Array, jax.Array]:
        """$P_K$ and $P_V$, `(length, heads, width)`; where there are stacked axes, they come first."""

    def at_rest(self, task=None):
        keys, values = self.pair()
        return Prefix(keys=keys, values=values)

    def output(self, y, *args):
        if apart():
            return y
        key, value, mask = y  # (batch, keys, heads, width) twice, and (batch or 1, heads or 1, queries, keys)
        keys, values = self.pair()
        before = lambda p, x: jnp.concatenate([jnp.broadcast_to(p.astype(x.dtype), (len(x), *p.shape)), x], axis=1)
        if mask is not None:
            seen = mask.dtype == bool  # a mask of numbers is added to scores
            mask = jnp.pad(mask, [(0, 0)] * 3 + [(len(keys), 0)], constant_values=seen)
        return before(keys, key), before(values, value), mask


class Prefix(Prefixed):
    r"""$P_K$ and $P_V$ are what trains.

    Li and Liang, [Prefix-Tuning: Optimizing Continuous Prompts for Generation](https://arxiv.org/abs/2101.00190), ACL
    2021; at every layer without a reparametrization, [P-tuning v2](https://arxiv.org/abs/2110.07602), 2022.
    """

    keys: Trainable[jax.Array, "length heads width"]
    values: Trainable[jax.Array, "length heads width"]

    def pair(self):
        return self.keys, self.values


class ProjectedPrefix(Prefixed):
    r"""$[P_K; P_V] = \tanh(E D + d)\,U + u$ while it trains: $E$, $D$ and $d$ are shared by the layers.

    $U$ and $u$ of all layers are the last layer of one network. Li and Liang,
    [Prefix-Tuning](https://arxiv.org/abs/2101.00190), ACL 2021, section 4.3.
    """

    rows: Trainable[Any]  # (length, features), shared as are the next two
    down: Trainable[Any]  # (features, width)
    down_bias: Trainable[Any]  # (width,)
    up: Trainable[jax.Array, "width outputs"]  # of the keys' heads, and of the values'
    up_bias: Trainable[jax.Array, "outputs"]
    heads: Static[int]

    def pair(self):
        hidden = jnp.tanh(self.rows @ self.down + self.down_bias[..., None, :])
        y = hidden @ self.up + self.up_bias[..., None, :]
        y = y.reshape(*y.shape[:-1], 2, self.heads, -1)
        return y[..., 0, :, :], y[..., 1, :, :]


def projected(
    params: Params, found: Mapping[str, Call], length: int, width: int, zeros: bool, key: jax.Array
) -> tuple[Params, dict[str, ProjectedPrefix]]:
    """The tree with what networks share, one for all layers of a kind, and the nodes at the places `found`."""
    kind = lambda path: re.sub(r"\d+", "", path)
    kinds, nodes = {}, {}
    for (path, call), k in zip(found.items(), jax.random.split(key, len(found)), strict=True):
        heads, features = call.shape[2], call.shape[2] * call.shape[3]
        if kind(path) not in kinds:
            key_rows, key_down = jax.random.split(jax.random.fold_in(key, len(kinds)))
            down, bias = uniform(key_down, features, (features, width), (width,))
            rows = jax.random.normal(key_rows, (length, features))
            arrays = {"prefix_rows": rows, "prefix_down": down, "prefix_down_bias": bias}
            params, refs = share(params, **{name: Free(array=x) for name, x in arrays.items()})
            kinds[kind(path)] = [ref.name for ref in refs.values()]
        rows, down, bias = (Ref(name, call.stack) for name in kinds[kind(path)])
        shapes = (*call.stack, width, 2 * features), (*call.stack, 2 * features)
        up, up_bias = map(jnp.zeros, shapes) if zeros else uniform(k, width, *shapes)
        nodes[path] = ProjectedPrefix(rows=rows, down=down, down_bias=bias, up=up, up_bias=up_bias, heads=heads)
    return params, nodes
