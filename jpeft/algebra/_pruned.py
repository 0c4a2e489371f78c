"""Sums of what is left of adapters, once entries in which they might disagree are gone."""

from collections.abc import Sequence
from typing import get_args

import jax

from .._targets import Option, one_of
from .._tree import Params
from ._combine import Combined, combine
from ._rule import Rule, Sign, largest, some
from ._sums import Weights


def magnitude_prune(
    trees: Sequence[Params], *, density: float, weights: Weights | None = None, rank: Option = None
) -> Combined:
    r"""$\sum_i w_i\,p(D_i)$, where $p$ keeps the entries of every matrix that are largest in size.

    **Arguments:** those of `linear`, and

    - `density`: the share of the entries that are kept: of $N$ exactly $\lfloor density \cdot N \rfloor$.
    - `rank`: of the `LoRA` nodes that come nearest, as for `svd`. By default all is kept, in `Delta` nodes of the size
      of the kernels.

    **Raises** `ValueError` as `svd` does, and for a density outside `(0, 1]`.
    """
    return combine(trees, weights, rule=Rule(largest, density), rank=rank)


def ties(
    trees: Sequence[Params],
    *,
    density: float,
    sign: Sign = "total",
    weights: Weights | None = None,
    rank: Option = None,
) -> Combined:
    r"""TIES: of every entry the mean of those $w_i\,p(D_i)$ that have the sign which most of the $p(D_i)$ have.

    $p$ keeps the entries of every matrix that are largest in size. Those that are zero are not counted in the mean.

    Yadav et al., [TIES-Merging: Resolving Interference When Merging Models](https://arxiv.org/abs/2306.01708), NeurIPS
    2023. As in Hugging Face's PEFT, matrices are pruned one by one and not all together, and `weights` have no vote.

    **Arguments:** those of `magnitude_prune`, and

    - `sign`: which sign most have: that of $\sum_i p(D_i)$, the `"total"`, or that of more of the $p(D_i)$, by
      `"frequency"`. It is positive where they are even.

    **Raises** `ValueError` as `magnitude_prune` does, and for an unknown `sign`.
    """
    one_of("sign", sign, get_args(Sign))
    return combine(trees, weights, rule=Rule(largest, density, sign), rank=rank)


def dare(
    trees: Sequence[Params],
    *,
    density: float,
    sign: Sign | None = None,
    weights: Weights | None = None,
    rank: Option = None,
    key: jax.Array | None = None,
) -> Combined:
    r"""DARE: $\sum_i w_i\,p(D_i)$, where $p$ drops entries at random and scales up the others: $E[p(D)] = D$.

    Yu et al., [Language Models are Super Mario](https://arxiv.org/abs/2311.03099), ICML 2024.

    **Arguments:** those of `magnitude_prune`, and

    - `density`: the rate at which entries are kept, and what those are divided by.
    - `sign`: DARE-TIES: a sign is elected, and the mean taken, as `ties` does. By default it is the sum.
    - `key`: every matrix of every tree has its own draws of it. `jax.random.key(0)` if left out.

    **Raises** `ValueError` as `ties` does.
    """
    one_of("sign", sign, (None, *get_args(Sign)))
    return combine(trees, weights, rule=Rule(some, density, sign), rank=rank, key=key)
