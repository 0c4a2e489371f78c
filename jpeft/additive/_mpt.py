"""MPT: one prompt for many tasks, times a matrix of low rank for each."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from .._node import Trainable
from .._targets import TABLE, Targets
from .._tree import Params, default, transform
from ._prompt import SoftPrompt, put_prompt
from ._tasks import check_task


class MPT(SoftPrompt):
    r"""$P_k = P \odot (u_k v_k)$ for task $k$: the rows $P$ are shared, $u_k$ and $v_k$ are of low rank.

    Wang et al., [Multitask Prompt Tuning Enables Parameter-Efficient Transfer
    Learning](https://arxiv.org/abs/2303.02861), ICLR 2023.
    """

    rows: Trainable[jax.Array]  # (length, features)
    u: Trainable[jax.Array]  # (tasks, length, rank)
    v: Trainable[jax.Array]  # (tasks, rank, features)

    def prompt(self, tasks):
        if tasks is None and len(self.u) > 1:
            raise ValueError(f"Which of the {len(self.u)} tasks? Call the model with `task_ids`, (batch,) integers.")
        tasks = jnp.zeros(1, jnp.int32) if tasks is None else tasks
        u, v = (jnp.take(x, tasks, axis=0) for x in (self.u, self.v))  # NaN, for tasks that there are not
        return self.rows[None] * (u @ v)

    def at_rest(self, task=None):
        check_task(task, len(self.u))
        return super().at_rest(task)


@transform
def mpt(
    params: Params,
    *,
    tasks: int = 1,
    rank: int = 1,
    length: int = 20,
    init: Any = "vocabulary",
    placeholder: int | None = None,
    factors: Literal["ones", "normal"] = "ones",
    targets: Targets = TABLE,
    within: str = "",
    key: jax.Array | None = None,
) -> Params:
    r"""Put a prompt that depends on its task before every sequence, or into it. See `MPT`.

    Calls say which: `jpeft.apply(model, variables, ids, task_ids=tasks)`, with a number for every example. With one
    task they need not. `jpeft.collapse(params, task=k)` leaves the prompt of task `k` alone.

    **Arguments:**

    - `tasks`: how many.
    - `rank`: of $u_k v_k$.
    - `length`, `init`, `placeholder`, `targets`, `within`: as for `prompt`; `init` is of the shared rows.
    - `factors`: `"ones"`: $u_k v_k$ starts as ones, so that all tasks have the shared prompt. `"normal"`: both of
      deviation 0.02, which makes a prompt of nearly zero.
    - `key`: for `init` and `factors`; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for no task, a rank below one, unknown `factors`, and as `prompt` does.
    """
    if tasks < 1 or rank < 1 or factors not in ("ones", "normal"):
        raise ValueError(f"MPT has tasks, a rank, and 'ones' or 'normal' factors, not {tasks=}, {rank=}, {factors=}.")
    key_rows, key_u, key_v = jax.random.split(default(key), 3)

    def new(rows):
        shapes = (tasks, length, rank), (tasks, rank, rows.shape[1])
        u, v = (0.02 * jax.random.normal(k, s) for k, s in zip((key_u, key_v), shapes, strict=True))
        if factors == "ones":
            u, v = jnp.zeros_like(u).at[:, :, 0].set(1), v.at[:, 0].set(1)
        return MPT(rows=rows.astype(jnp.float32), u=u, v=v)

    how = {"length": length, "init": init, "placeholder": placeholder, "targets": targets, "within": within}
    return put_prompt(params, new, **how, tasks=True, key=key_rows)
