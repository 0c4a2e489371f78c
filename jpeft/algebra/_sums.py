"""Weighted sums of adapters: exact ones, and the nearest of a rank."""

from collections.abc import Sequence

import jax

from .._targets import Option
from .._tree import Params
from ._changes import factored
from ._combine import Combined, combine


Weights = Sequence[float] | jax.Array


def cat(trees: Sequence[Params], *, weights: Weights | None = None) -> Params:
    r"""$\sum_i w_i D_i$ exactly, of terms of low rank: `LoRA` with $A = [A_1 \dots A_n]$ and $B$ of the $w_i s_i B_i$.

    Ranks add up. Weights of any sign are exact, and can be differentiated by. For the trees and `weights`, and what is
    raised, see `linear`.

    **Raises** `ValueError` also for nodes that have no such factors, with every path.
    """
    lacking = lambda node: (
        None if factored(node) else f"{type(node).__name__} has no factors. Take `linear`, or `svd` with a rank."
    )
    return combine(trees, weights, fault=lacking).params


def linear(trees: Sequence[Params], *, weights: Weights | None = None) -> Params:
    r"""$\sum_i w_i D_i$ exactly, of all that changes weights: $D_i = W'_i - W$.

    Where all nodes of a path are terms of low rank it is what `cat` makes of them, and else a `Delta`, of the size of
    the kernel.

    **Arguments:**

    - `trees`: parameters with nodes over one base: the same arrays, or of the same bits. Where a tree has no node, its
      change is zero.
    - `weights`: $w$, a number for every tree; each is 1 if left out. With one of -1, a task is unlearned.

    **Raises** `ValueError`, with every path and reason, for nodes beside modules, which act on activations; for those
    that have taken the place of their base, as `unfreeze` leaves them; for trees of different parameters, bases, or
    letters of axes; for trees without nodes; and for other weights than one a tree.

    Ilharco et al., [Editing Models with Task Arithmetic](https://arxiv.org/abs/2212.04089), ICLR 2023.
    """
    return combine(trees, weights).params


def subtract(a: Params, b: Params) -> Params:
    """What `a` changes and `b` does not: `linear([a, b], weights=[1, -1])`."""
    return linear([a, b], weights=[1.0, -1.0])


def svd(trees: Sequence[Params], *, rank: Option, weights: Weights | None = None) -> Combined:
    r"""The `LoRA` of a given rank that is nearest to $\sum_i w_i D_i$, and how near that is. See `Combined`.

    No other of its rank is nearer in the Frobenius norm. Where all nodes of a path are terms of low rank the sum is
    never formed: it takes QR decompositions of their factors, and the SVD of a matrix as large as their ranks.

    **Arguments:** those of `linear`, and

    - `rank`: a number, or a mapping from patterns to numbers. Where there are fewer singular values, all stay. The
      change of a vector, such as a bias, stays whole, in a `Delta`.

    **Raises** `ValueError` as `linear` does, and for a rank below one.
    """
    return combine(trees, weights, rank=rank)
