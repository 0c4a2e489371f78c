"""Blocks: some layers train for a while, then others."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._kernel import IN, OUT, STACK
from .._node import Frozen, Reparam, Trainable, rebox, value, whole, widened
from .._shared import SHARED, refs, resolve, share
from .._targets import named_leaves
from .._tree import Params, map_nodes, nodes_of, put, shared_arrays, transform
from ._layers import Place, held, places
from ._unfreeze import Free


class Block(Reparam):
    r"""$W'_l = R_{slot_l}$ in those layers of a stack that train, $W'_l = W_l$ in the others.

    $R$ has a matrix for each layer that trains, and is the same array for all layers: of a scan over them, its gradient
    is a sum, and no gradient of the whole stack is formed. A parameter of one layer alone is $W' = R$, without slots.

    $R$ is in float32 at least, the master copy of a $W$ in bfloat16; $W'$ has the dtype of $W$.
    """

    rows: Trainable[jax.Array]  # (layers that train, ...), or (...), of the parameter's own shape
    slot: Frozen[jax.Array | None, ""] = None  # int32: which of the rows is the layer's; -1: none

    def weight(self, w):
        if self.slot is None:
            return self.rows.reshape(w.shape)
        return jnp.where(self.slot < 0, w, self.rows[self.slot].reshape(w.shape))


@transform
def blocks(
    params: Params,
    *,
    layers: Sequence[int] | jax.Array,
    pattern: str | None = None,
    axis: int = 0,
    key: jax.Array | None = None,
) -> Params:
    r"""Let some layers train, numbered (`layers_11/...`) or stacked by `nn.scan` (`layers/...`). See `Block`.

    Of layers that trained before, as an earlier call had it, this takes the trained values into the tree, and freezes
    them: `jpeft.optim.switch` does so, and sees to the optimizer's state. Where the layers never change,
    `jpeft.unfreeze` has less to do.

    **Arguments:**

    - `layers`: their numbers; of several stacks, an encoder's and a decoder's, those of each. Of stacked layers they
      may be traced: any choice of so many layers is the same program, and one that they do not have is NaN. Numbered
      ones change the tree's structure.
    - `pattern`, `axis`: which parameters are in layers, and where those are stacked: as for `unfreeze`.
    - `key`: not used.

    **Raises** `ValueError` where there are no layers, for numbers that they do not have or that come twice, for traced
    numbers of numbered layers, and for a parameter that another node has taken the place of.
    """
    params = settled(params)
    leaves = {n: x for n, x in named_leaves(params).items() if jnp.issubdtype(whole(x).dtype, jnp.floating)}
    at = places(leaves, pattern, axis)
    _check(layers, at)
    chosen = {n: place for n, place in at.items() if place.layer is None or place.layer in layers}
    put(params, dict.fromkeys(chosen, lambda x: x))  # refuses nodes, before anything is computed

    layers, shared = jnp.asarray(layers, jnp.int32), {}
    stacked = {n: value(leaves[n]) for n, place in chosen.items() if place.layer is None}
    if stacked:
        rows = {n: widened(jnp.take(jnp.moveaxis(w, axis, 0), layers, axis=0, mode="fill")) for n, w in stacked.items()}
        params, shared = share(params, **{n.replace("/", "."): Free(array=x) for n, x in rows.items()})

    def one(name, x):
        if name not in stacked:
            return Block(base=x, rows=jnp.array(widened(value(x))), axes=_letters(x, None))
        slot = jnp.full(at[name].count, -1, jnp.int32)
        slot = slot.at[layers].set(jnp.arange(layers.size, dtype=jnp.int32), mode="clip")  # the NaNs are to be seen
        return Block(base=x, rows=shared[name.replace("/", ".")], slot=slot, axes=_letters(x, axis))

    return put(params, {n: functools.partial(one, n) for n in chosen})


def settled(params: Params) -> Params:
    """The tree with what every `Block` has become in its place, as an array that does not train."""
    shared, own = shared_arrays(params), refs(nodes_of(params, Block))
    plain = lambda x: rebox(x, value(resolve(x, shared)))
    kept = {name: x for name, x in params.get(SHARED, {}).items() if name not in own}
    params = map_nodes(plain, {k: x for k, x in params.items() if k != SHARED}, Block)
    return params | ({SHARED: kept} if kept else {})


def _letters(parameter: Any, axis: int | None) -> str:
    """Its entries train one by one: it only matters which axis is stacked."""
    ndim = len(whole(parameter).shape)
    rest = [d for d in range(ndim) if axis is None or d != axis % ndim]
    inputs = rest[: len(rest) - 1][:1]
    return "".join(IN if d in inputs else OUT if d in rest else STACK for d in range(ndim))


def _check(layers: Any, at: Mapping[str, Place]) -> None:
    if isinstance(layers, jax.core.Tracer):
        if numbered := next((name for name, place in at.items() if place.layer is not None), None):
            raise ValueError(
                f"{numbered!r} is in a numbered layer, and which of those train is the structure of the tree: `layers` "
                "cannot be traced. Call this outside of `jax.jit`, or scan over the layers."
            )
        return
    numbers, known = np.asarray(layers).tolist(), set.intersection(*held(at).values())
    if not numbers or len(set(numbers)) < len(numbers) or not set(numbers) <= known:
        raise ValueError(f"`layers` are {numbers}: name some of {sorted(known)}, each once.")
