"""Factors of the kernels of convolutions: for the channels, and for what is done at each position of the window.

Hyeon-Woo et al., [FedPara](https://arxiv.org/abs/2108.06098), proposition 3.
"""

import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from .._kernel import IN
from .._targets import Sites, Targets, kernels
from .._tree import Params
from ._factors import uniform


def windows(params: Params, targets: Targets | None, sites: Sites | None) -> Mapping[str, int]:
    """How many positions the window of every targeted convolution has, and 1 for other kernels, by pattern."""
    convolved = (n for n in kernels(params, targets, sites) if sites and n in sites and "conv" in sites[n].ops)
    inner = lambda site: [n for n, c in zip(site.shape, site.axes, strict=True) if c == IN]
    return {re.escape(n): math.prod(inner(sites[n])[:-1]) for n in convolved} | {".*": 1}


def uniform_factors(key: jax.Array, d_in: int, rank: int, d_out: int, window: int = 1) -> tuple[jax.Array, ...]:
    """Random `a (d_in, rank)` and `b (rank, d_out)`, and for a window `t (window, rank, rank)`. See `over`."""
    left, right, core = jax.random.split(key, 3)
    a, b = uniform(left, (d_in, rank), d_in), uniform(right, (rank, d_out), rank if window == 1 else d_out)
    return (a, b) if window == 1 else (a, b, uniform(core, (window, rank, rank), window * rank))


def over(a: jax.Array, t: jax.Array | None = None) -> jax.Array:
    r"""The factor `a (channels, rank)` over a window: $\sum_j a_{c,j}\,t_{k,j,i}$ in row $(k, c)$ and column $i$."""
    return a if t is None else jnp.einsum("cj,kji->kci", a, t).reshape(-1, t.shape[-1])
