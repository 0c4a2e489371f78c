"""LoRA-GA: LoRA whose first step is that of full fine-tuning, as far as its rank allows."""

import jax
import jax.numpy as jnp

from .._kernel import fold
from .._node import whole
from .._targets import Option, Sites, Targets, kernels, named_leaves
from .._tree import Params, transform
from ._factors import check, scale_of
from ._from_data import wrap_with
from ._pissa import PiSSA


@transform
def lora_ga(
    params: Params,
    *,
    gradients: Params,
    rank: Option = 8,
    alpha: Option = None,
    rslora: bool = False,
    dropout: Option = 0.0,
    gamma: float | None = 16.0,
    weighted: bool = False,
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""LoRA that starts from singular vectors of the gradient of every targeted kernel. See `PiSSA`.

    Where the gradient is $G = U \Sigma V^T$: $A_0 = c\,U_{1..r}$ and $B_0 = c\,V_{r+1..2r}^T$ and
    $c = \sqrt[4]{out} / \sqrt\gamma$.
    So the first step of gradient descent changes $A B$, but for its second order, by a multiple of the part of $G$ of
    rank $2r$: of all changes of that rank the one nearest to a step of full fine-tuning.

    **Arguments:** those of `pissa`, but `iterations`, and

    - `gradients`: what `gradient_scores(loss_fn, params, batches)` returned. Its scale does not matter.
    - `gamma`: $\gamma$; `None` for orthonormal factors, $c = 1$.
    - `weighted`: as PEFT has it: $A_0 = U_{1..r}$ and $B_0 = c\,\Sigma_{r+1..2r} V_{r+1..2r}^T$, which depends on the
      scale of the gradients.
    - `key`: not used.

    **Raises** `ValueError` for a rank below one or above half a kernel's, a dropout outside `[0, 1)`, gradients that
    lack targeted kernels, and for targets as `wrap` does.

    Wang et al., [LoRA-GA](https://arxiv.org/abs/2407.05000), NeurIPS 2024.
    """
    axes, found = kernels(params, targets, sites), named_leaves(gradients)
    shapes = {name: whole(x).shape for name, x in named_leaves(params).items() if name in axes}
    fits = lambda name: name in found and found[name].shape == shapes[name]
    lacking = [f"{name}: {shape}" for name, shape in shapes.items() if not fits(name)]
    if lacking:
        raise ValueError(f"`gradients` lacks {'; '.join(lacking)}. Target these, too, in `gradient_scores`.")

    def new(g, w, *, rank, alpha, dropout):
        check(rank, dropout)
        if 2 * rank > min(w.shape):
            raise ValueError(f"A gradient of {w.shape[0]} inputs and {w.shape[1]} outputs has no {rank=} twice.")
        u, s, v = jnp.linalg.svd(g.astype(jnp.float32), full_matrices=False)
        a, b = u[:, :rank], v[rank : 2 * rank]
        c = 1.0 if gamma is None else w.shape[1] ** 0.25 / gamma**0.5
        a, b = (a, c * s[rank : 2 * rank, None] * b) if weighted else (c * a, c * b)
        return PiSSA.of(a, b, scale=scale_of(alpha, rank, rslora), dropout=dropout)

    data = {name: fold(found[name], letters) for name, letters in axes.items()}
    return wrap_with(params, new, data, axes, rank=rank, alpha=alpha, dropout=dropout)
