"""SAID: one small vector moves the whole model."""

import math

import jax
import jax.numpy as jnp

from .._kernel import folded
from .._node import Frozen, Static, Trainable, whole
from .._shared import share
from .._targets import Sites, Targets, named_leaves, one_of, parameters
from .._tree import Params, transform, wrap
from ..selective._delta import Dense
from ..selective._unfreeze import Free
from ._fastfood import PROJECTIONS


class SAID(Dense):
    r"""$W' = W + \lambda\,P v$: all nodes share one trainable $v$, and each has a random $P$ and a $\lambda$.

    $P$ is drawn again from `seed` wherever it is used. DID, which is not aware of the structure, has no $\lambda$.

    Aghajanyan et al., [Intrinsic Dimensionality Explains the Effectiveness of Language Model
    Fine-Tuning](https://arxiv.org/abs/2012.13255), ACL 2021.
    """

    v: Trainable[jax.Array, "dimension"]
    factor: Trainable[jax.Array | None, ""]
    seed: Frozen[jax.Array, "words"]  # uint32
    shape: Static[tuple[int, int]]
    projection: Static[str] = "fastfood"

    @property
    def change(self):
        key = jax.random.wrap_key_data(self.seed, impl="threefry2x32")
        with jax.threefry_partitionable(True):  # a saved seed must mean the same wherever it is restored
            change = PROJECTIONS[self.projection](key, self.v, math.prod(self.shape)).reshape(self.shape)
        return change if self.factor is None else self.factor * change


@transform
def said(
    params: Params,
    *,
    dimension: int = 20_000,
    structure_aware: bool = True,
    projection: str = "fastfood",
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Move all targeted parameters together within a random subspace of few dimensions. See `SAID`.

    $v$ is at `params["jpeft_shared"]`.

    **Arguments:**

    - `dimension`: how many numbers train, $\lambda$ among them.
    - `structure_aware`: whether each parameter, and each layer of a stacked one, has a $\lambda$: SAID, or else DID.
    - `projection`: `"fastfood"`, which takes memory and time of the size of the parameter, or `"dense"`, a normal
      matrix of `dimension` times that size.
    - `targets`, `sites`: which parameters. By default every one of floating point but the output head's.
    - `key`: for the projections; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for an unknown projection, a dimension that leaves nothing for $v$, and for targets as
    `delta` does.
    """
    one_of("projection", projection, PROJECTIONS)
    leaves = named_leaves(params)
    shapes = [folded(whole(leaves[n]).shape, axes) for n, axes in parameters(params, targets, sites).items()]
    factors = sum(math.prod(shape[:-2]) for shape in shapes) if structure_aware else 0
    if dimension <= factors:
        raise ValueError(f"Of a dimension of {dimension}, {factors} are the parameters' own factors: none is left.")
    params, refs = share(params, said_v=Free(array=jnp.zeros(dimension - factors)))

    def new(key, w):
        seed, factor = jax.random.bits(key, (2,), jnp.uint32), jnp.ones(()) if structure_aware else None
        return SAID(v=refs["said_v"], factor=factor, seed=seed, shape=w.shape, projection=projection)

    return wrap(params, new, targets=targets, sites=sites, key=key, entrywise=True)
