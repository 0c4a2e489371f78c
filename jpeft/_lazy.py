"""Parameters that are still in a file: read when their turn comes, a layer at a time, and let go."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


Index = tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Lazy:
    """Stands for an array that is not in memory yet. It has its shape and dtype: `jax.eval_shape` takes it for one.

    **Fields:**

    - `part`: the entry at an index of the first `depth` axes, over which the array is stacked: one layer, one expert.
    - `over`: the axes of a mesh that divide these, if any do.
    """

    shape: tuple[int, ...]
    dtype: Any
    part: Callable[[Index], jax.Array]
    depth: int = 0
    over: tuple[str | None, ...] = ()

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def read(self) -> jax.Array:
        return self.map(lambda index, x: x)

    def map(self, fn: Callable[[Index, jax.Array], Any]) -> Any:
        """`fn(index, x)` of every part `x`: a tree of arrays, stacked over the parts; never two parts in memory."""
        return stack(lambda index: fn(index, self.part(index)), self.shape[: self.depth], self.over)


def read(x: Any) -> Any:
    """`x` itself, or the array that it stands for."""
    return x.read() if isinstance(x, Lazy) else x


def stack(part: Callable[[Index], Any], sizes: tuple[int, ...], over: tuple[str | None, ...] = ()) -> Any:
    """`part(index)` for every index below `sizes`, a tree of arrays each, stacked on first axes.

    `over` names the axes of a mesh that divide the first axes of parts which are on a mesh.

    Each is written in its place before the next is made: it takes the room of the result and of one part.
    """
    if not sizes:
        return jax.block_until_ready(part(()))
    whole: Any = None
    for index in np.ndindex(*sizes):
        tree = part(index)
        if whole is None:
            whole = jax.tree.map(functools.partial(_room, sizes, over), tree)
        # Waited for, as parts that are under way would be in memory together.
        whole = jax.block_until_ready(_write(whole, tree, np.array(index, np.int32)))
        del tree
    return whole


def _room(sizes: tuple[int, ...], over: tuple[str | None, ...], x: jax.Array) -> jax.Array:
    sharding = x.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*over, *sharding.spec))
    return jnp.zeros((*sizes, *x.shape), x.dtype, device=sharding)


@functools.partial(jax.jit, donate_argnums=0)
def _write(whole: Any, part: Any, index: jax.Array) -> Any:
    def one(whole, x):
        start = [*index, *[jnp.int32(0)] * x.ndim]
        return jax.lax.dynamic_update_slice(whole, jnp.expand_dims(x, range(len(index))), start)

    return jax.tree.map(one, whole, part)
