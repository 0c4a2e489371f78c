"""LoftQ: a quantized base, with a LoRA that starts from what was rounded away."""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Unpack

import jax
import jax.numpy as jnp

from .._kernel import fold, stacked, unfold
from .._lazy import read
from .._node import value
from .._targets import Option, Sites, Targets, kernels, named_leaves, options
from .._tree import Params, replaced, transform, vacant
from ..offline._run import Running, run
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
    **running: Unpack[Running],
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
    - `running`: `progress`, `resume` and `save_every`, a batch being one kernel. See the page on offline passes.

    **Raises** `ValueError` for fewer than one step, a `quantize` of several transforms or with targets, a rank below 1
    or above a kernel's, a dropout outside `[0, 1)`, a kernel that is a node already, a `resume` of another pass, and
    for targets as `wrap` does.

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

    leaves = named_leaves(params)
    vacant(leaves, axes)

    def new(name, leaf, steps):
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

    def step(found, params, batch):
        return found | {name: new(name, read(leaf), steps) for name, leaf in batch.items()}

    shapes = {name: jax.eval_shape(functools.partial(new, name, steps=1), leaves[name]) for name in axes}
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    batches = [{name: leaves[name]} for name in axes]
    how = {"what": "quantize_with_adapter", "options": {"steps": steps, "scaled": scaled, "key": key}}
    found = run(step, start, params, batches, **how, **running)
    return replaced(params, {name: lambda _, name=name: found[name] for name in axes}, over_nodes=False)


@functools.partial(jax.jit, static_argnames="rank")
def _part(m: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """The factors of the part of rank `rank` of every matrix in `m`."""
    return stacked(lambda m: principal(None, m, rank, None), m.ndim - 2)(m)
