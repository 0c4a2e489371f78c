"""APOLLO: gradients at full rank, each channel as long as moments of low rank tell."""

from typing import Literal

import jax
import optax

from .._targets import Sites, Targets, one_of
from .._tree import default
from ._projection import gains, projected, random


def apollo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int = 256,
    every: int = 200,
    scale: float = 1.0,
    per: Literal["channel", "tensor"] = "channel",
    limit: float | None = 1.01,
    weight_decay: float = 0.0,
    inner: optax.GradientTransformation | None = None,
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""APOLLO: $W \leftarrow W - \eta\,(S + \lambda W)$ with
    $S_{:,j} = \sqrt\alpha\,\frac{\lVert u(R)_{:,j} \rVert}{\lVert R_{:,j} \rVert}\,G_{:,j}$ and $R = P^T G$.

    $P$ is random, $N(0, 1/r)$, and drawn anew every so many steps: there is no decomposition, and as a key tells $P$,
    nothing of it is kept. The norm of $S$ grows by no more than a factor from one step to the next, unless it was 0.

    APOLLO-Mini is `apollo(learning_rate, rank=1, per="tensor", scale=128)`: moments of one row for each kernel.

    Zhu et al., [APOLLO: SGD-like Memory, AdamW-level Performance](https://arxiv.org/abs/2412.05270), MLSys 2025.

    **Arguments:** those of `galore`, and

    - `scale`: $\alpha$. The ratio is smaller than that of moments at full rank, by some $\sqrt{r / n}$ with $n$ the
      smaller side of the kernel: $\alpha = n / r$ makes up for it.
    - `per`: one ratio for every channel of the kernel's larger side, or one for all of the kernel, `"tensor"`.
    - `limit`: the factor by which the norm of $S$ may grow in a step; `None` for any.
    - `key`: for $P$; `jax.random.key(0)` if left out. It is no part of the state: go on with the same one.

    **Raises** as `galore` does, and `ValueError` for another `per`.
    """
    axes = {"channel": -2, "tensor": (-2, -1)}
    one_of("per", per, axes)
    expand = lambda g, p, r, u: (0.0, scale**0.5 * g * gains(u, r, axes[per]))
    how = {"rank": rank, "inner": inner, "weight_decay": weight_decay, "targets": targets, "sites": sites}
    return projected(learning_rate, random(every, rank, default(key)), expand, limit=limit, **how)
