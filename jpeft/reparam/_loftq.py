"""LoftQ: a quantized base, with a LoRA that starts from what was rounded away."""

import functools
import inspect
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp

from .._kernel import fold, stacked, unfold
from .._node import value
from .._targets import Option, Sites, Targets, kernels, options
from .._tree import Params, put, transform
from ._factors import check, scale_of
from ._lora import LoRA
from ._singular import principal


@transform
def quantize_with_adapter(
    params: Params,
    *,
    quantize: Callable[..., Params],
    rank: Option = 8,
    alpha: Option = None,
    rslora: bool = False,
    dropout: Option = 0.0,
    steps: int = 5,
    scaled: bool = True,
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""LoftQ: codes $Q$ and a LoRA over them that together are near to every targeted kernel. See `LoRA`.

    In turns, $Q = q(W - s A B)$ and $s A B$ is the part of rank $r$ of $W - Q$, starting from $A B = 0$. It needs no
    data.

    **Arguments:** those of `lora`, but `init`, and

    - `quantize`: $q$, a transform such as `jpeft.nf4()` or `jpeft.int4(group=32)`; its targets are those given here.
    - `steps`: how many turns.
    - `scaled`: whether $s$ is taken into account, as above. PEFT leaves it out of both steps, so that its start is near
      to the kernels for $s = 1$ alone.
    - `key`: for `quantize`.

    **Raises** `ValueError` for fewer than one step, a `quantize` of several transforms or with targets, a rank below 1
    or above a kernel's, a dropout outside `[0, 1)`, a kernel that is a node already, and for targets as `wrap` does.

    Li et al., [LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models](https://arxiv.org/abs/2310.08659),
    ICLR 2024.
    """
    if steps < 1:
        raise ValueError(f"There is at least one step, not {steps}.")
    own = inspect.signature(quantize).parameters.get("targets")
    if own is None or own.default is not None:
        raise ValueError("`quantize` is one transform without targets, such as `jpeft.nf4()`: give `targets` here.")
    axes = kernels(params, targets, sites)
    given = options({"rank": rank, "alpha": alpha, "dropout": dropout}, list(axes))

    def new(name, leaf):
        rank, alpha, dropout = (given[name][option] for option in ("rank", "alpha", "dropout"))
        check(rank, dropout)
        w, letters = value(leaf), axes[name]
        exact = fold(w.astype(jnp.float32), letters)
        if rank > min(exact.shape[-2:]):
            raise ValueError(f"{name!r} has matrices of {exact.shape[-2:]}: what is rounded away has no {rank=}.")
        term = jnp.zeros_like(exact)
        for _ in range(steps):
            rest = {name: unfold(exact - term, w.shape, letters).astype(w.dtype)}
            base = quantize(rest, targets={re.escape(name): letters}, key=key)[name]
            a, b = _part(exact - fold(value(base).astype(jnp.float32), letters), rank)
            term = a @ b
        scale = scale_of(alpha, rank, rslora)
        root = scale**0.5 if scaled else 1.0
        return LoRA(base=base, a=a / root, b=b / root, scale=scale, dropout=dropout, axes=letters)

    return put(params, {name: functools.partial(new, name) for name in axes})


@functools.partial(jax.jit, static_argnames="rank")
def _part(m: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """The factors of the part of rank `rank` of every matrix in `m`."""
    return stacked(lambda m: principal(None, m, rank, None), m.ndim - 2)(m)
