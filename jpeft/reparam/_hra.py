"""HRA: Householder reflections."""

from typing import Literal

import jax
import jax.numpy as jnp

from .._node import Reparam, Static, Trainable
from .._targets import Option, Sites, Targets
from .._tree import Params, transform, wrap


class HRA(Reparam):
    r"""$W' = H_r \cdots H_1 W$ with reflections $H_i = I - 2 \hat u_i \hat u_i^\top$, $\hat u_i = u_i / |u_i|$.

    The product is formed at once, $W' = W - \hat U S^{-1} \hat U^\top W$, where $S$ is the part of
    $\hat U^\top \hat U$ below the diagonal, plus $I / 2$. With `orthogonal`, the $u_i$ are made orthonormal first (Gram
    and Schmidt), and $S = \hat U^\top \hat U / 2$.

    Yuan et al., [Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection
    Adaptation](https://arxiv.org/abs/2405.17484), NeurIPS 2024.
    """

    u: Trainable[jax.Array, "in rank"]
    orthogonal: Static[bool] = False

    def weight(self, w):
        u = self.u / jnp.linalg.norm(self.u, axis=0, keepdims=True)
        gram = u.T @ u
        s = gram / 2 if self.orthogonal else jnp.tril(gram, -1) + jnp.eye(len(gram), dtype=gram.dtype) / 2
        return w - u @ jnp.linalg.solve(s, u.T @ w)


@transform
def hra(
    params: Params,
    *,
    rank: Option = 8,
    orthogonal: bool = False,
    init: Literal["paired", "random"] | None = None,
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Reflect the inputs of every targeted kernel `rank` times. See `HRA`.

    **Arguments:**

    - `rank`: the number of reflections; a number, or a mapping from patterns to numbers.
    - `orthogonal`: whether the reflections are made orthogonal to one another.
    - `init`: `"paired"`: the reflections are random and come in equal pairs, which undo each other, so that the model
      is unchanged at the start; it needs an even rank. `"random"`: each of its own; the model is another one from the
      start. By default `"paired"`, but `"random"` with `orthogonal`, which equal pairs cannot be.
    - `targets`, `sites`: which kernels. By default every one but the output head.
    - `key`: for $u$; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for a rank below one or above a kernel's inputs, for an odd one or `orthogonal` with
    `"paired"`, and for targets as `wrap` does.
    """
    init = init or ("random" if orthogonal else "paired")
    if init not in ("paired", "random") or (orthogonal and init == "paired"):
        raise ValueError(f"`init` is {init!r}: 'paired', unless the reflections are orthogonal, or 'random'.")

    def new(key, w, *, rank):
        own = rank // 2 if init == "paired" else rank
        if not 1 <= rank <= w.shape[0] or (init == "paired" and rank % 2):
            raise ValueError(
                f"HRA needs a rank from 1 to the {w.shape[0]} inputs, an even one if they start in pairs, not {rank}: "
                "choose another, or `init='random'`, which changes the model at the start."
            )
        u = jax.random.uniform(key, (w.shape[0], own), minval=-1.0, maxval=1.0) / own**0.5
        return HRA(u=jnp.repeat(u, rank // own, axis=1), orthogonal=orthogonal)

    return wrap(params, new, targets=targets, sites=sites, key=key, rank=rank)
