"""OFT: orthogonal fine-tuning, by blocks of rotations."""

from typing import Literal

import jax
import jax.numpy as jnp

from .._node import Reparam, Static, Trainable
from .._targets import Option, Sites, Targets
from .._tree import Params, map_nodes, transform, wrap


class OFT(Reparam):
    r"""$W' = \mathrm{diag}(R_1, \dots, R_n)\,W$: each block of inputs is rotated.

    $R_i$ is a function of the skew matrix $Q_i$, whose entries above the diagonal are row $i$ of `generators`, or its
    only row, which all blocks share. `"neumann"`: $R = I + 2 Q + 2 Q^2 + \dots + 2 Q^{k-2} + Q^{k-1}$, with $k$ terms,
    which is $(I + Q)(I - Q)^{-1}$ but for powers from $Q^{k-1}$ on; `"exact"`: $R = (I - Q)(I + Q)^{-1}$. **The two
    rotate in opposite senses.**

    Qiu et al., [Controlling Text-to-Image Diffusion by Orthogonal Finetuning](https://arxiv.org/abs/2306.07280),
    NeurIPS 2023, and [OFTv2](https://arxiv.org/abs/2506.19847), 2025, for the series.
    """

    generators: Trainable[jax.Array, "blocks pairs"]  # pairs of `block` inputs: block (block - 1) / 2
    block: Static[int]
    cayley: Static[Literal["neumann", "exact"]] = "neumann"
    terms: Static[int] = 5
    epsilon: Static[float | None] = None  # COFT: the largest norm of all Q together

    def weight(self, w):
        blocks = w.reshape(-1, self.block, w.shape[1])
        rotations = jnp.broadcast_to(self.rotations(), (blocks.shape[0], self.block, self.block))
        return (rotations @ blocks).reshape(w.shape)

    def rotations(self) -> jax.Array:
        """$R$ of every row of the generators: `(rows, block, block)`."""
        generators = self.generators if self.epsilon is None else _within(self.generators, self.epsilon)
        rows, columns = jnp.triu_indices(self.block, 1)
        q = jnp.zeros((len(generators), self.block, self.block), generators.dtype)
        q = q.at[:, rows, columns].set(generators)
        q = q - q.mT
        return cayley(q) if self.cayley == "exact" else neumann(q, self.terms)


def _within(generators: jax.Array, epsilon: float) -> jax.Array:
    """Generators `(..., blocks, pairs)`, scaled down where the norm of their Q is above `epsilon / sqrt(blocks)`."""
    bound = epsilon**2 / generators.shape[-2]
    square = 2 * jnp.sum(generators**2, axis=-1, keepdims=True)  # each stands in Q twice
    return generators * jnp.sqrt(bound / jnp.maximum(square, bound))


def bounded(params: Params, *, epsilon: float) -> Params:
    """COFT as a projection between steps: the tree with every $Q_i$ of `OFT` at most `epsilon / sqrt(blocks)` in norm.

    It takes whole trees and trainable ones, and works under `jax.jit`. With `oft(epsilon=...)`, in contrast, generators
    stay as the optimizer left them, and what is computed of them is bounded.
    """
    return map_nodes(lambda x: x.replace(generators=_within(x.generators, epsilon)), params, OFT)


def cayley(q: jax.Array) -> jax.Array:
    """$(I - Q)(I + Q)^{-1}$ of skew matrices `(..., n, n)`: rotations."""
    eye = jnp.broadcast_to(jnp.eye(q.shape[-1], dtype=q.dtype), q.shape)
    return jnp.linalg.solve(eye + q, eye - q)  # the two commute


def neumann(q: jax.Array, terms: int) -> jax.Array:
    """$I + 2 Q + \\dots + 2 Q^{k-2} + Q^{k-1}$, for $k$ `terms`."""
    total = power = jnp.broadcast_to(jnp.eye(q.shape[-1], dtype=q.dtype), q.shape)
    for n in range(1, terms):
        power = power @ q
        total = total + (power if n == terms - 1 and n > 1 else 2 * power)
    return total


@transform
def oft(
    params: Params,
    *,
    block: Option = 32,
    share: bool = False,
    cayley: Literal["neumann", "exact"] = "neumann",
    terms: int = 5,
    epsilon: float | None = None,
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Rotate the inputs of every targeted kernel, block by block. See `OFT`.

    **Arguments:**

    - `block`: how many inputs a block has; a number that divides the inputs, or a mapping from patterns to numbers.
    - `share`: whether all blocks of a kernel are rotated alike.
    - `cayley`: `"neumann"`, a series that is fast and, for small $Q$, nearly orthogonal, or `"exact"`.
    - `terms`: of the series, at least 2.
    - `epsilon`: COFT: the norm of each $Q_i$ is kept below `epsilon / sqrt(blocks)`. Left out, there is no bound.
    - `targets`, `sites`: which kernels. By default every one but the output head.
    - `key`: not used: all $Q$ start at zero.

    **Raises** `ValueError` for a block that does not divide the inputs of a kernel, for other options outside of these
    bounds, and for targets as `wrap` does.
    """
    if cayley not in ("neumann", "exact") or terms < 2:
        raise ValueError(f"OFT is 'neumann' or 'exact', of at least 2 terms, not {cayley=} and {terms=}.")

    def new(key, w, *, block):
        blocks, rest = divmod(w.shape[0], block) if block > 1 else (0, 1)
        if rest:
            raise ValueError(f"OFT needs blocks of at least 2 inputs that divide a kernel's {w.shape[0]}, not {block}.")
        generators = jnp.zeros((1 if share else blocks, block * (block - 1) // 2))
        return OFT(generators=generators, block=block, cayley=cayley, terms=terms, epsilon=epsilon)

    return wrap(params, new, targets=targets, sites=sites, key=key, block=block)
