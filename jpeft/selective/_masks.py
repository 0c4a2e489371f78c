"""Masks: which entries of the parameters are to train. They are trees of booleans, made once, outside of `jit`."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from .._kernel import fold, unfold
from .._node import is_param, value, whole
from .._targets import Sites, Targets, name_of, named_leaves, one_of, parameters
from .._tree import Params, default
from ..offline._gradients import fisher, gradient_scores
from ..offline._values import filled, values_of


Scope = Literal["all", "each"]


def largest(scores: Mapping[str, np.ndarray], density: float, scope: Scope) -> list[np.ndarray]:
    """Where the largest of all entries are, or of each matrix, in named arrays `(stack..., in, out)`. See `mask_of`."""
    if not 0 < density <= 1:
        raise ValueError(f"A density is in (0, 1], not {density}.")
    one_of("scope", scope, get_args(Scope))
    broken = [name for name, x in scores.items() if np.isnan(x).any()]
    if broken:
        raise ValueError(f"Some entries are not a number, which has no rank: {', '.join(broken)}.")
    matrices = list(scores.values())
    top = lambda x: _top(x, int(density * x.size * (1 + 1e-12)))  # 0.29 of 100 is 29, and not 28.999999999999996
    if scope == "each":
        of_each = lambda x: np.stack([top(row) for row in x.reshape(-1, x.shape[-2] * x.shape[-1])])
        found = [of_each(x) for x in matrices]
    else:
        flat = top(np.concatenate([x.ravel() for x in matrices]))
        found = np.split(flat, np.cumsum([x.size for x in matrices])[:-1])
    if not any(x.any() for x in found):
        raise ValueError(f"A density of {density} of {sum(x.size for x in matrices)} entries is none.")
    return [mask.reshape(x.shape) for mask, x in zip(found, matrices, strict=True)]


def _top(x: np.ndarray, k: int) -> np.ndarray:
    """Where the `k` largest entries of a vector are: the first of those that are equal, and none that is -inf."""
    if not k:
        return np.zeros(x.shape, bool)
    least = np.partition(x, -k)[-k]
    found = x > least
    ties = np.flatnonzero((x == least) & (x > -np.inf))
    found[ties[: k - np.count_nonzero(found)]] = True
    return found


def mask_of(scores: Any, *, density: float, scope: Scope = "all", sites: Sites | None = None) -> Any:
    r"""The mask of the entries with the largest scores, for `sparse`.

    **Arguments:**

    - `scores`: a tree as that of the parameters, with an array where entries count and `None` elsewhere.
    - `density`: the share of these entries that the mask has: of $N$ exactly $\lfloor density \cdot N \rfloor$. Of
      equal scores the first win, and `-inf` is never chosen.
    - `scope`: `"all"` is one ranking of all entries. `"each"` is one of every parameter, or, where `sites`, or letters
      in `targets`, tell what is stacked, of every layer's and expert's.

    **Raises** `ValueError` for a density outside `(0, 1]` or of no entry, and for scores that are not a number, with
    every path.
    """
    scores = jax.tree.map(lambda x: np.asarray(value(x), np.float32), scores, is_leaf=is_param)
    return _of_largest(scores, parameters(scores, ".*", sites), density, scope)


def _of_largest(scores: Any, axes: Mapping[str, str], density: float, scope: Scope) -> Any:
    """The mask of scores whose axes have these letters."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(jax.tree.map(lambda x: np.asarray(x, np.float32), scores))
    named = {name_of(path): x for path, x in leaves}
    found = largest({name: np.asarray(fold(x, axes[name])) for name, x in named.items()}, density, scope)
    back = lambda mask, name: np.asarray(unfold(mask, named[name].shape, axes[name]))
    return structure.unflatten([back(mask, name) for mask, name in zip(found, named, strict=True)])


def random_mask(
    params: Params,
    *,
    density: float,
    scope: Scope = "all",
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Any:
    """The mask of entries drawn at random, without replacement. See `mask_of`.

    **Arguments:** those of `mask_of`, and

    - `targets`, `sites`: which parameters. By default every one of floating point but the output head's.
    - `key`: `jax.random.key(0)` if left out.
    """
    leaves, axes = named_leaves(params), parameters(params, targets, sites)
    keys = jax.random.split(default(key), len(axes))
    drawn = {name: jax.random.uniform(k, whole(leaves[name]).shape) for name, k in zip(axes, keys, strict=True)}
    return _of_largest(filled(params, drawn), axes, density, scope)


def magnitude_mask(
    params: Params,
    *,
    density: float,
    scope: Scope = "all",
    targets: Targets | None = None,
    sites: Sites | None = None,
) -> Any:
    """The mask of the entries that are largest in size, positive or negative. **Arguments:** those of `random_mask`."""
    axes = parameters(params, targets, sites)
    sizes = jax.tree.map(jnp.abs, values_of(params, axes))
    return _of_largest(filled(params, sizes), axes, density, scope)


def fish_mask(
    loss_fn: Callable,
    params: Params,
    batches: Iterable,
    *,
    density: float,
    scope: Scope = "all",
    targets: Targets | None = None,
    sites: Sites | None = None,
    **options: Any,
) -> Any:
    """The mask of the entries with the largest Fisher information. **Arguments:** those of `mask_of` and of `fisher`.

    Sung et al., [Training Neural Networks with Fixed Sparse Masks](https://arxiv.org/abs/2111.09839), NeurIPS 2021.
    """
    axes = parameters(params, targets, sites)
    return _of_largest(fisher(loss_fn, params, batches, targets=targets, **options), axes, density, scope)


def second_order_mask(
    loss_fn: Callable,
    params: Params,
    batches: Iterable,
    *,
    density: float,
    scope: Scope = "all",
    squared: bool = False,
    curvature: Any = None,
    targets: Targets | None = None,
    sites: Sites | None = None,
    **options: Any,
) -> Any:
    r"""The mask of the entries whose change lowers a second-order approximation of the loss the most.

    With $\mathcal L(\theta_0 + \delta) \approx \mathcal L(\theta_0) + \sum_i g_i \delta_i + \frac12 h_i \delta_i^2$
    these are the entries of the largest $g_i^2 / h_i$. Where one bound is taken for all $h_i$ they are those of the
    largest $|g_i|$. It is not sharpness-aware minimization, with which it shares an acronym.

    **Arguments:** those of `mask_of` and of `gradient_scores`, as `clip` and `targets`, and

    - `squared`: $\sum_t g_t^2$ over batches stands for $g^2$, in place of $(\sum_t g_t)^2$.
    - `curvature`: $h$, a tree as of scores, such as `fisher` returns.

    Fu et al., [On the Effectiveness of Parameter-Efficient Fine-Tuning](https://arxiv.org/abs/2211.15583), AAAI 2023.
    """
    axes = parameters(params, targets, sites)
    sums = gradient_scores(loss_fn, params, batches, squared=squared, targets=targets, **options)
    scores = jax.tree.map(jnp.abs, sums)
    if curvature is not None:  # of |g| the root, as squares of small gradients would be zero
        power = 1.0 if squared else 0.5
        weigh = lambda g, h: jnp.where(g == 0, g, g / jnp.abs(h) ** power)
        scores = jax.tree.map(weigh, scores, curvature)
    return _of_largest(scores, axes, density, scope)
