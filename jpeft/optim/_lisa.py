"""LISA: which layers train next, by chance."""

import jax

from .._tree import default


def lisa(period: int | jax.Array, count: int, *, active: int = 2, key: jax.Array | None = None) -> jax.Array:
    """The layers that LISA trains in a period: `active` of `count`, `(active,)` int32, ascending, each equally often.

    For `jpeft.optim.switch`; embedding, head and the last norm train all along. The authors' periods have 20 steps.

    **Arguments:**

    - `period`: its number, such as `step // 20`; it may be traced.
    - `count`: how many layers there are.
    - `key`: every period has its own draw from it; `jax.random.key(0)` if left out.

    **Raises** `ValueError` where there are not so many layers.

    Pan et al., [LISA: Layerwise Importance Sampling](https://arxiv.org/abs/2403.17919), NeurIPS 2024.
    """
    if not 1 <= active <= count:
        raise ValueError(f"Of {count} layers there cannot be {active} that train.")
    return jax.random.choice(jax.random.fold_in(default(key), period), count, (active,), replace=False).sort()
