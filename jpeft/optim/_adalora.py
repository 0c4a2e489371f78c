"""AdaLoRA's allocator: the ranks of all matrices, out of one budget that shrinks as training goes on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._tree import Params, map_nodes, nodes_of
from ..reparam._adalora import AdaLoRA


class AllocatorState(NamedTuple):
    """How many steps there were, and two averages for every entry of $A$, $e$ and $B$, one tuple a node."""

    count: jax.Array  # int32
    sensitivity: list[tuple[jax.Array, ...]]
    uncertainty: list[tuple[jax.Array, ...]]


class Allocator(NamedTuple):
    """Two pure functions, as those of an Optax transform; `update` belongs after the optimizer's step."""

    init: Callable[[Params], AllocatorState]
    update: Callable[[Params, Any, AllocatorState], tuple[Params, AllocatorState]]


def rank_allocator(
    *,
    total_steps: int,
    target_rank: float = 8,
    warmup_steps: int = 0,
    final_steps: int = 0,
    every: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> Allocator:
    r"""Share a budget of triplets out among all `AdaLoRA` matrices of a tree, each layer of a stack for one.

    With the gradient $g$ of an entry $p$, step by step,

    $$I = |p\,g|, \quad \bar I \leftarrow \beta_1 \bar I + (1 - \beta_1) I, \quad
    \bar U \leftarrow \beta_2 \bar U + (1 - \beta_2) |I - \bar I|, \quad S(p) = \bar I\,\bar U$$

    and triplet $k$ scores $S(e_k)$ plus the means of $S$ over column $k$ of $A$ and over row $k$ of $B$. The budget is
    $b_0$, all triplets, in the first `warmup_steps`, then
    $b_T + \lfloor(b_0 - b_T)(1 - (t - t_{warmup}) / (T - t_{warmup} - t_{final}))^3\rfloor$ and in the last
    `final_steps` $b_T$, `target_rank` times the number of matrices. Every `every` steps those $e_k$ become zero that
    are not among the $b(t)$ best, whichever matrix they are of; of equals the first in the tree are kept. A zeroed
    $e_k$ has a gradient and grows again until the budget is at its end: then the nodes' masks are set, for good.

    The result is a pair. `init(params)` makes the state, and `update(params, grads, state)` returns the parameters and
    the state: after the optimizer's step, with the gradients that it was given. Both can be compiled, and no array
    changes its shape.

    **Arguments:**

    - `total_steps`: $T$, how often `update` will be called.
    - `target_rank`: the mean rank in the end.
    - `warmup_steps`, `final_steps`: how many there are before the budget shrinks, and after it has.
    - `every`: how many steps lie between two allocations.
    - `beta1`, `beta2`: the averages' decay.

    **Raises** `ValueError` for steps that leave none to shrink in, for a decay outside `(0, 1)`, and for a tree without
    `AdaLoRA` nodes or with fewer triplets than the target.

    Zhang et al., [AdaLoRA: Adaptive Budget Allocation](https://arxiv.org/abs/2303.10512), ICLR 2023.
    """
    if not 0 <= warmup_steps < total_steps - final_steps <= total_steps or every < 1:
        given = f"{total_steps=}, {warmup_steps=}, {final_steps=}, {every=}"
        raise ValueError(f"No step is left to shrink the budget in: {given}.")
    if not (0 < beta1 < 1 and 0 < beta2 < 1):
        raise ValueError(f"A decay is in (0, 1), not {beta1=} and {beta2=}.")
    last = total_steps - final_steps
    def budgets(found):
        """By step, up to the last in which it changes; in float64, for rounding down to be exact."""
        start = sum(node.e.size for node in found)
        end = int(target_rank * sum(node.e.size // node.e.shape[-1] for node in found))
        if not 0 <= end <= start:
            raise ValueError(f"There are {start} triplets, from which a `target_rank` of {target_rank} makes {end}.")
        left = 1 - (np.arange(last + 1) - warmup_steps).clip(0) / (last - warmup_steps)
        return ((start - end) * left**3 + end).astype(np.int32)

    def init(params):
        found = _nodes(params)
        budgets(found)  # refused before a step is made
        zeros = lambda: [jax.tree.map(jnp.zeros_like, _parts(node)) for node in found]
        return AllocatorState(jnp.int32(0), zeros(), zeros())

    def update(params, grads, state):
        found, step = _nodes(params), state.count + 1
        parts, slopes = ([_parts(node) for node in nodes] for nodes in (found, _nodes(grads)))
        present = jax.tree.map(lambda p, g: jnp.abs(p * g), parts, slopes)
        average = lambda beta: lambda old, new: jnp.where(step < last, beta * old + (1 - beta) * new, old)
        sensitivity = jax.tree.map(average(beta1), state.sensitivity, present)
        away = jax.tree.map(lambda x, mean: jnp.abs(x - mean), present, sensitivity)
        uncertainty = jax.tree.map(average(beta2), state.uncertainty, away)

        scores = [_scores(*parts) for parts in zip(sensitivity, uncertainty, strict=True)]
        budget = jnp.asarray(budgets(found))[jnp.minimum(step, last)]
        due = (step > warmup_steps) & (step < last) & (step % every == 0)
        best = iter(_best(scores, budget))

        def allocated(node):
            keep = next(best)
            mask = jnp.where(step == last, keep, node.mask)
            return node.replace(mask=mask, e=jnp.where((due & ~keep) | ~mask, 0, node.e))

        return map_nodes(allocated, params, AdaLoRA), AllocatorState(step, sensitivity, uncertainty)

    return Allocator(init, update)


def _nodes(tree: Params) -> list[AdaLoRA]:
    return list(nodes_of(tree, AdaLoRA, "adalora").values())
def _parts(node: AdaLoRA) -> tuple[jax.Array, ...]:
    return node.a, node.e, node.b


def _scores(sensitivity: tuple[jax.Array, ...], uncertainty: tuple[jax.Array, ...]) -> jax.Array:
    """Of every triplet `(..., rank)`."""
    a, e, b = (i * u for i, u in zip(sensitivity, uncertainty, strict=True))
    return e + jnp.mean(a, axis=-2) + jnp.mean(b, axis=-1)


def _best(scores: list[jax.Array], budget: jax.Array) -> list[jax.Array]:
    """Which scores are among the `budget` largest of all: as many as that, ties or not."""
    flat = jnp.concatenate([x.ravel() for x in scores])
    order = jnp.argsort(flat, stable=True, descending=True)
    kept = jnp.zeros(flat.size, bool).at[order].set(jnp.arange(flat.size) < budget)
    parts = jnp.split(kept, np.cumsum([x.size for x in scores])[:-1])
    return [part.reshape(x.shape) for part, x in zip(parts, scores, strict=True)]
