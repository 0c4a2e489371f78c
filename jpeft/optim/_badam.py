"""BAdam: which layer trains next, in turn."""

from typing import Literal

import jax
import jax.numpy as jnp

from .._targets import one_of
from .._tree import default


def badam(
    period: int | jax.Array,
    count: int,
    *,
    order: Literal["random", "ascending", "descending"] = "random",
    key: jax.Array | None = None,
) -> jax.Array:
    """The layer that BAdam trains in a period, `(1,)` int32: every one of `count` once, then every one again.

    For `jpeft.optim.switch`; nothing else trains. The authors' periods have 50 steps.

    **Arguments:**

    - `period`: its number, such as `step // 50`; it may be traced.
    - `count`: how many layers there are.
    - `order`: `"random"` is another in every round.
    - `key`: for the random orders; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for an unknown order.

    Luo et al., [BAdam: A Memory Efficient Full Parameter Optimization Method](https://arxiv.org/abs/2404.02827),
    NeurIPS 2024.
    """
    turn, place = divmod(jnp.int32(period), count)
    orders = {
        "random": lambda: jax.random.permutation(jax.random.fold_in(default(key), turn), count)[place],
        "ascending": lambda: place,
        "descending": lambda: count - 1 - place,
    }
    one_of("order", order, orders)
    return jnp.reshape(orders[order](), 1)
