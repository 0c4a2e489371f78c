"""LoRAHub: a composition of trained LoRAs for a new task, found without gradients."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from .._tree import Params, default, put
from ..offline._run import shown
from ..reparam._lora import LoRA
from ._members import Members, members


Score = Callable[[np.ndarray], float]


def lorahub(
    trees: Sequence[Params],
    loss: Callable[[Params], jax.typing.ArrayLike],
    *,
    budget: int = 40,
    penalty: float = 0.05,
    bound: float = 1.5,
    minimize: Callable[[Score, np.ndarray, int], np.ndarray] | None = None,
    progress: bool = True,
    key: jax.Array | None = None,
) -> tuple[Params, np.ndarray]:
    r"""The LoRA $A = \sum_n w_n A_n$, $B = \sum_n w_n B_n$ of trees that `lora` has tuned on one base, and its $w$.

    $w$ makes $loss + penalty \cdot \mathrm{mean}|w|$ small, by values of the loss alone: no memory for gradients. The
    same numbers weigh $A$ and $B$, so that $w$ and $-w$ are one LoRA.

    Huang et al., [LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA
    Composition](https://arxiv.org/abs/2307.13269), COLM 2024.

    **Arguments:**

    - `trees`: their ranks and scales may differ.
    - `loss`: of a tree on a few examples of the task. Compile it: it is called with one structure.
    - `budget`: how many values of it are computed.
    - `penalty`, `bound`: of the weights, none of which gets larger than `bound`.
    - `minimize`: `(score, start, budget) -> w`, in NumPy, such as an optimizer of nevergrad's, as the authors have it.
      By default the (1+1) evolution strategy with the one-fifth rule.
    - `progress`: whether a bar is shown, where standard error is a terminal and rich is installed.
    - `key`: for the strategy's steps; `jax.random.key(0)` if left out.

    **Returns** a tree with `LoRA`s, that train further if you wish, and the weights `(trees,)`.

    **Raises** `ValueError` for a budget below one, and, with every path, for trees of different bases or targets, and
    for nodes that are no LoRA.
    """
    if budget < 1:
        raise ValueError(f"`budget` is {budget}: at least one value of the loss is needed.")
    base, found = members(trees)

    def composed(weights):
        nodes = _sum(found, weights)
        return put(base, {path: lambda w, x=x: x.replace(base=w) for path, x in nodes.items()}, over_nodes=True)

    def score(weights):
        return float(loss(composed(weights))) + penalty * float(np.mean(np.abs(weights)))

    start = np.zeros(len(trees))
    if minimize is None:
        steps = np.asarray(jax.random.normal(default(key), (budget - 1, len(trees))))
        weights = _evolved(score, start, shown(steps, "lorahub", progress), bound)
    else:
        weights = np.clip(minimize(score, start, budget), -bound, bound)
    return composed(weights), weights


def _sum(found: dict[str, Members], weights: np.ndarray) -> dict[str, LoRA]:
    parts = _weighted({path: (m.a, m.b) for path, m in found.items()}, jnp.asarray(weights, jnp.float32))
    return {path: LoRA(a=a, b=b, scale=found[path].scale, axes=found[path].axes) for path, (a, b) in parts.items()}


@jax.jit
def _weighted(factors, weights):
    return jax.tree.map(lambda x: jnp.einsum("...nij,n->...ij", x, weights.astype(x.dtype)), factors)


def _evolved(score: Score, start: np.ndarray, steps: Sequence[np.ndarray], bound: float) -> np.ndarray:
    """Random steps, of which those are taken that are no worse; longer after such ones, and shorter after others.

    Kern et al., [Learning probability distributions in continuous evolutionary
    algorithms](https://doi.org/10.1023/B:NACO.0000023416.59689.4e), 2004.
    """
    best, lowest, size = start, score(start), 0.5
    for step in steps:
        trial = np.clip(best + size * step, -bound, bound)
        value = score(trial)
        if value <= lowest:
            best, lowest, size = trial, value, 1.5 * size
        else:
            size *= 1.5**-0.25
    return best
