"""The parameters of a narrow model as those that weigh most in a wide one."""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from .._node import value, widened
from .._targets import TABLE, Sites, named_leaves
from .._tree import Params, put
from ..places import ATTENTION, ATTENTION_OUTPUT, BLOCK, FEED_FORWARD_OUTPUT


Arrays = Mapping[str, jax.Array]


def pruned(params: Params, narrow: Params, sites: Sites, reduction: int) -> Params:
    """`narrow` with those rows and columns of `params` whose entries have the largest sums of absolute values.

    Of hidden states these are columns of the embeddings, the same in all layers; inside of a feed-forward block, units
    in all of its kernels; inside of an attention, places in a head, in all heads and kernels, two that rotations pair
    together.

    **Arguments:**

    - `sites`: of the narrow model, which is `reduction` times narrower.

    **Raises** `ValueError`, with every path and shape, for parameters of other modules.
    """
    wide = {name: widened(value(x)) for name, x in named_leaves(params).items()}
    like = {name: x.shape for name, x in named_leaves(narrow).items()}
    table = next((name for name in wide if re.fullmatch(TABLE, name)), None)
    if table is None:
        raise ValueError("Which hidden states weigh most is told by a table of embeddings, and there is none.")
    stream = _largest(jnp.sum(jnp.abs(wide[table]), axis=0), reduction)
    found = {name: wide[name] for name, shape in like.items() if wide[name].shape == shape}
    found |= {name: wide[name][..., stream] for name in like if wide[name].shape[-1] == stream.size * reduction}
    widths = {path.rpartition("/")[0]: reduction * c.features_out for path, c in sites.modules.items() if "/kv" in path}
    for path in (path for path in sites.modules if re.fullmatch(BLOCK, path)):
        own = {name: wide[name] for name in like if name.startswith(f"{path}/")}
        prune = lambda own: _block(own, widths, stream, reduction)
        found |= (jax.vmap(prune) if sites.modules[path].stack else prune)(own)
    if faults := [f"  {n}: {wide[n].shape}" for n, s in like.items() if n not in found or found[n].shape != s]:
        raise ValueError("Nothing tells how to prune these: start the side network at random.\n" + "\n".join(faults))
    return put(narrow, {name: lambda _, x=x: x for name, x in found.items()})


def _largest(scores: jax.Array, reduction: int) -> jax.Array:
    """The places of the largest scores, ascending."""
    return jnp.sort(jax.lax.top_k(scores, scores.size // reduction)[1])


def _block(own: Arrays, widths: Mapping[str, int], stream: jax.Array, reduction: int) -> dict[str, jax.Array]:
    """The parameters of a block that are left of its `own`."""
    owner = lambda name: name.rpartition("/")[0]
    parent = lambda name: owner(owner(name))
    is_out = lambda name: any(re.fullmatch(p, owner(name)) for p in (ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT))
    scores: dict[str, list[jax.Array]] = {}
    for name, x in own.items():
        if x.ndim == 2:
            scores.setdefault(parent(name), []).append(jnp.sum(jnp.abs(x), axis=1 if is_out(name) else 0))
    kept, sizes = {}, {}
    for path, each in scores.items():
        sizes[path] = widths[path] if re.fullmatch(ATTENTION, path) else min(x.size for x in each)
        score = sum(jnp.sum(x.reshape(-1, sizes[path]), axis=0) for x in each)
        if re.fullmatch(ATTENTION, path):
            half = sizes[path] // 2
            pairs = _largest(score.reshape(2, half).sum(axis=0), reduction)
            kept[path] = jnp.concatenate([pairs, half + pairs])
        else:
            kept[path] = _largest(score, reduction)

    def left(name, x):
        size, places = sizes.get(parent(name)), kept.get(parent(name))
        if places is None:  # a norm of hidden states
            return x[stream]
        inner = lambda n: (size * jnp.arange(n // size)[:, None] + places[None]).reshape(-1)
        if x.ndim == 1:
            return x[stream] if is_out(name) else x[inner(x.size)]
        return x[inner(x.shape[0])][:, stream] if is_out(name) else x[stream][:, inner(x.shape[1])]

    return {name: left(name, x) for name, x in own.items()}
