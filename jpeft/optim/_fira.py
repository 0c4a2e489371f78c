"""Fira: GaLore, and what it leaves of the gradient as well."""

import optax

from .._targets import Sites, Targets
from ._projection import gains, projected, singular


def fira(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int = 128,
    every: int = 200,
    scale: float = 0.25,
    limit: float | None = 1.01,
    scale_residual: bool = False,
    weight_decay: float = 0.0,
    inner: optax.GradientTransformation | None = None,
    targets: Targets | None = None,
    sites: Sites | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Fira: $W \leftarrow W - \eta\,(\alpha\,P\,u(R) + S + \lambda W)$ with $R = P^T G$ and the residual
    $S_{:,j} = \frac{\lVert u(R)_{:,j} \rVert}{\lVert R_{:,j} \rVert}\,(G - P R)_{:,j}$.

    So the part of the gradient that GaLore drops is there too, as much longer, channel by channel, as `inner` has made
    the part that is projected. The norm of $S$ grows by no more than a factor from one step to the next, unless it
    was 0.

    Chen et al., [Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank
    Constraint?](https://arxiv.org/abs/2410.01623), 2024.

    **Arguments:** those of `galore`, and

    - `limit`: the factor by which the norm of $S$ may grow in a step; `None` for any.
    - `scale_residual`: $G - \alpha P R$ in place of $G - P R$, as the authors' code has it.

    **Raises** as `galore` does.
    """

    def expand(g, p, r, u):
        kept = scale if scale_residual else 1.0
        return scale * (p @ u), (g - kept * (p @ r)) * gains(u, r)

    how = {"rank": rank, "inner": inner, "weight_decay": weight_decay, "targets": targets, "sites": sites}
    return projected(learning_rate, singular(every), expand, limit=limit, **how)
