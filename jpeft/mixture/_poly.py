"""Poly and MHR: an inventory of LoRA skills, of which every task has a mixture."""

import jax
import jax.numpy as jnp

from .._kernel import stacked
from .._node import Static, Trainable, widened
from .._targets import Option, Sites, Targets
from .._tree import Params, place, transform
from ..additive._tasks import Tasks, check_task, task_ids
from ..reparam._factors import check, scale_of, uniform
from ..reparam._lora import LoRA
from ._term import Term, attach_terms


class Poly(Term):
    r"""$y' = y + s\,x A B$ with $A = \sum_k w_k A_k$ and $B = \sum_k w_k B_k$: what is mixed is factors, not products.

    $w = z / \sum z$ over the skills with $z = \sigma(l_t)$, the logits of the example's task $t$. In a call with a key
    $z$ is drawn instead, for every example, from a binary Concrete distribution of temperature 1. With several splits,
    $A$ and $B$ are in as many parts, of rows and of columns, and each is mixed by itself.

    Ponti et al., [Combining Modular Skills in Multitask Learning](https://arxiv.org/abs/2202.13914), 2022; with several
    splits, Caccia et al., [Multi-Head Adapter Routing](https://arxiv.org/abs/2211.03831), NeurIPS 2023.
    """

    a: Trainable[jax.Array]  # (split, skill, in / splits, rank)
    b: Trainable[jax.Array]  # (split, skill, rank, out / splits)
    logits: Trainable[jax.Array]  # (task, split, skill)
    scale: Static[float] = 1.0

    @property
    def random(self):
        return True

    def term(self, x, dropped, key):
        tasks, known = task_ids(), len(self.logits)
        if tasks is None and known > 1:
            raise ValueError(f"Which of the {known} tasks? Call the model with `task_ids`, (batch,) integers.")
        if tasks is None:
            tasks = jnp.zeros(1 if key is None else len(x), jnp.int32)
        if len(tasks) not in (1, len(x)):
            raise ValueError(f"There are `task_ids` for {len(tasks)} examples, and what enters a layer is {x.shape}.")
        a, b = self.mixed(tasks, key)
        rows = dropped.reshape(len(tasks), -1, x.shape[-1])
        return (self.scale * (rows @ a) @ b).reshape(*x.shape[:-1], -1)

    def mixed(self, tasks: jax.Array, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """$A$ (n, in, rank) and $B$ (n, rank, out) of tasks (n,)."""
        logits = jnp.take(widened(self.logits), tasks, axis=0)  # NaN, for tasks that there are not
        z = jax.nn.sigmoid(logits if key is None else logits + jax.random.logistic(key, logits.shape))
        w = (z / jnp.sum(z, axis=-1, keepdims=True)).astype(self.a.dtype)
        a = jnp.einsum("nqk,qkir->nqir", w, self.a)
        b = jnp.einsum("nqk,qkro->nrqo", w, self.b)
        return a.reshape(len(tasks), -1, a.shape[-1]), b.reshape(len(tasks), b.shape[1], -1)

    def at_rest(self, task=None):
        tasks = self.logits.shape[-3]
        if task is None and tasks > 1:
            raise ValueError(f"Which of the {tasks} tasks? `jpeft.collapse(params, task=k)` leaves that of one.")
        check_task(task, tasks)
        mixed = stacked(lambda node: node.mixed(jnp.array([task or 0]), None), self.a.ndim - 4)
        a, b = (jnp.squeeze(x, -3) for x in mixed(self))
        return LoRA(a=a, b=b, scale=self.scale, dropout=self.dropout, axes=self.axes)


@transform
def poly(
    params: Params,
    *,
    rank: Option = 8,
    tasks: int = 1,
    skills: Option = 4,
    splits: Option = 1,
    alpha: Option = 1,
    dropout: Option = 0.0,
    within: str = "",
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Add a term of low rank beside every targeted kernel, that is a mixture of skills for every task. See `Poly`.

    Calls say which: `jpeft.apply(model, variables, ids, task_ids=tasks)`, with a number for every example. With one
    task they need not. `jpeft.collapse(params, task=k)` leaves the LoRA of task `k`, which merges. The logits learn
    best at a higher rate than the rest.

    **Arguments:**

    - `rank`: of each skill; a number, or a mapping from patterns to numbers, as are `skills`, `splits`, `alpha` and
      `dropout`.
    - `tasks`: how many.
    - `skills`: how many LoRAs there are to mix.
    - `splits`: in how many parts inputs and outputs are divided, each with a mixture of its own: MHR, if above 1.
    - `alpha`: the term is scaled by $s$ = `alpha / rank`.
    - `dropout`: the rate at which inputs of the term are dropped, where `apply` is given a `"dropout"` key.
    - `within`: the path of the module that is called with the `task_ids`, by default the model itself.
    - `targets`, `sites`: as for `moe_lora`.
    - `key`: for the logits, $U(\pm 10^{-3})$, and $A_k \sim U(\pm \sqrt{splits / in})$, beside $B_k = 0$;
      `jax.random.key(0)` if left out.

    **Raises** `ValueError` for fewer than one task, skill or split, for splits that do not divide inputs and outputs,
    and as `moe_lora` does.
    """

    def new(key, features_in, features_out, *, rank, skills, splits, alpha, dropout):
        check(rank, dropout)
        if min(tasks, skills, splits) < 1 or features_in % splits or features_out % splits:
            raise ValueError(
                f"There are tasks and skills, and splits that divide {features_in} inputs and {features_out} outputs: "
                f"not {tasks=}, {skills=}, {splits=}."
            )
        key_a, key_logits = jax.random.split(key)
        width = features_in // splits
        return Poly(
            a=uniform(key_a, (splits, skills, width, rank), width),
            b=jnp.zeros((splits, skills, rank, features_out // splits)),
            logits=1e-3 * jax.random.uniform(key_logits, (tasks, splits, skills), minval=-1.0, maxval=1.0),
            scale=scale_of(alpha, rank),
            dropout=dropout,
        )

    how = {"rank": rank, "skills": skills, "splits": splits, "alpha": alpha, "dropout": dropout}
    params = attach_terms(params, new, name="poly", targets=targets, sites=sites, key=key, **how)
    return place(params, {within: Tasks()}, "tasks")
