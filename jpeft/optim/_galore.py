"""GaLore: moments of gradients in the space of their largest singular vectors."""

import optax

from .._targets import Sites, Targets
from ._projection import projected, singular


def galore(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int = 128,
    every: int = 200,
    scale: float = 0.25,
    weight_decay: float = 0.0,
    inner: optax.GradientTransformation | None = None,
    targets: Targets | None = None,
    sites: Sites | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""GaLore: $W \leftarrow W - \eta\,(\alpha\,P\,u(P^T G) + \lambda W)$, where `inner` has the updates $u$.

    $P$ are the $r$ first left singular vectors of the gradient $G$, taken anew every so many steps; $G$ is a kernel's
    `(in, out)` where `in` is at most `out`, and otherwise its transpose. Moments stay as they are when $P$ changes.

    Zhao et al., [GaLore: Memory-Efficient LLM Training by Gradient Low-Rank
    Projection](https://arxiv.org/abs/2403.03507), ICML 2024.

    **Arguments:**

    - `learning_rate`: $\eta$, a number or a schedule.
    - `rank`: $r$; at most the smaller side of a kernel.
    - `every`: the number of steps from one $P$ to the next.
    - `scale`: $\alpha$, for projected kernels alone.
    - `weight_decay`: $\lambda$, of everything that trains, at full rank.
    - `inner`: what makes updates of gradients and needs no parameters, by default `optax.scale_by_adam()`. What is not
      projected has its updates as they are.
    - `targets`, `sites`: which kernels of the trainable tree are projected, and what their axes mean. By default every
      one but the output head; arrays of nodes other than `Free` never.

    **Raises** `ValueError` for a rank or a number of steps below one, and, when the state is made, for a tree without
    kernels and for those whose axes nothing settles.
    """
    expand = lambda g, p, r, u: (scale * (p @ u), 0.0)
    how = {"rank": rank, "inner": inner, "weight_decay": weight_decay, "targets": targets, "sites": sites}
    return projected(learning_rate, singular(every), expand, limit=None, **how)
