"""Diff Pruning: a change of every entry, each with a gate that learns whether the entry may change at all."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from .._node import Frozen, Static, Trainable
from .._operands import fold_in
from .._targets import Option, Sites, Targets
from .._tree import Params, nodes_of, transform, wrap
from ._delta import Dense


class DiffPruning(Dense):
    r"""$W' = W + z \odot D$ with gates $z_{ij} \in [0, 1]$, times a gate of the whole matrix where it has one.

    A gate is hard concrete: $\mathrm{clip}(\sigma(\alpha + \epsilon)\,(r - l) + l,\ 0,\ 1)$. In a call with a key
    it is random, $\epsilon = \log u - \log(1 - u)$ with $u \sim U(10^{-4}, 1 - 10^{-4})$; otherwise $\epsilon = 0$.
    A gate that is clipped has no gradient.

    Guo, Rush and Kim, [Parameter-Efficient Transfer Learning with Diff Pruning](https://arxiv.org/abs/2012.07463),
    ACL 2021.
    """

    values: Trainable[jax.Array, "in out"]  # D
    alpha: Trainable[jax.Array, "in out"]
    alpha_group: Trainable[jax.Array | None, ""] = None
    noise: Frozen[Any] = None  # epsilon of the entries, and of the matrix: within a call that draws it
    bounds: Static[tuple[float, float]] = (-1.5, 1.5)  # l, r

    @property
    def change(self):
        entries, group = self.noise or (None, None)
        change = self.values * self._gate(self.alpha, entries)
        return change if self.alpha_group is None else change * self._gate(self.alpha_group, group)[..., None, None]

    def drawn(self, key):
        arrays = self.alpha, self.alpha_group
        noise = tuple(None if x is None else _logistic(fold_in(key, n), x) for n, x in enumerate(arrays))
        return super().drawn(fold_in(key, 2)).replace(noise=noise)

    def open(self) -> jax.Array:
        r"""How many gates are open in expectation: $\sum P(z > 0) = \sum \sigma(\alpha - \log(-l / r))$."""
        low, high = self.bounds
        shift = math.log(-low / high)
        return sum(jnp.sum(jax.nn.sigmoid(x - shift)) for x in (self.alpha, self.alpha_group) if x is not None)

    def _gate(self, alpha, noise):
        low, high = self.bounds
        s = jax.nn.sigmoid(alpha if noise is None else alpha + noise) * (high - low) + low
        return jax.lax.clamp(jnp.zeros_like(s), s, jnp.ones_like(s))  # unlike `jnp.clip` it has no gradient at the ends


def _logistic(key: jax.Array, like: jax.Array) -> jax.Array:
    u = jax.random.uniform(key, like.shape, like.dtype, 1e-4, 1 - 1e-4)
    return jnp.log(u) - jnp.log1p(-u)


def l0_penalty(params: Params) -> jax.Array:
    r"""How many gates of the `DiffPruning` nodes in a tree are open in expectation, of entries and of matrices.

    Times $\lambda$, such as the authors' 1.25e-7, it is added to the loss. Take it of the whole tree, within the loss.

    **Raises** `ValueError` if there is no `DiffPruning` node in the tree.
    """
    return sum(node.open() for node in nodes_of(params, DiffPruning, "diff_pruning").values())
@transform
def diff_pruning(
    params: Params,
    *,
    structured: bool = True,
    start: Option = 5.0,
    bounds: tuple[float, float] = (-1.5, 1.5),
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Add a trainable change with trainable gates to every targeted parameter, of any shape. See `DiffPruning`.

    It is the first of three phases, in which `l0_penalty` closes gates. The second keeps the largest changes, the third
    trains these alone.

    **Arguments:**

    - `structured`: whether every matrix has a gate of its own beside those of its entries.
    - `start`: $\alpha$ at the start; a number, or a mapping from patterns to numbers. From 5 the gates are open.
    - `bounds`: $l$ and $r$.
    - `targets`, `sites`: which parameters. By default every one of floating point but the output head's.
    - `key`: not used: all changes start at zero.

    **Raises** `ValueError` for bounds other than $l < 0$ and $r > 1$, a pattern that matches nothing, and for
    parameters that are no floating-point numbers.
    """
    low, high = bounds
    if not (low < 0 and high > 1):
        raise ValueError(f"Gates that can be shut and open need `bounds` below 0 and above 1, not {bounds}.")

    def new(key, w, *, start):
        group = jnp.asarray(start, jnp.float32) if structured else None
        return DiffPruning(
            values=jnp.zeros(w.shape),
            alpha=jnp.full(w.shape, start, jnp.float32),
            alpha_group=group,
            bounds=(float(low), float(high)),
        )

    return wrap(params, new, targets=targets, sites=sites, key=key, entrywise=True, start=start)
