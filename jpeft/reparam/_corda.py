"""CorDA: LoRA that starts from the part of a kernel that its inputs see most of, or least."""

import jax
import jax.numpy as jnp

from .._targets import Option
from .._tree import Params, transform
from ._factors import check, scale_of
from ._from_data import of_inputs, wrap_with
from ._pissa import PiSSA
from ._singular import check_part


@transform
def corda(
    params: Params,
    *,
    inputs: Params,
    rank: Option = 8,
    alpha: Option = None,
    rslora: bool = False,
    dropout: Option = 0.0,
    preserve: bool = False,
    damping: float = 0.01,
    key: jax.Array | None = None,
) -> Params:
    r"""LoRA that starts from a part of every kernel, told by its inputs' covariance $C$. See `PiSSA`.

    With $C W = U \Sigma V^T$ the kernel is $\sum_k \sigma_k\, C^{-1} u_k v_k^T$, a sum of parts of rank one. The $r$
    first of them, which inputs like those see most of, are $s A_0 B_0$; or the $r$ last, so that what inputs like those
    see is preserved. $C$ is scaled to a mean of 1 on its diagonal.

    **Arguments:** those of `pissa`, but `iterations`, `targets` and `sites`, and

    - `inputs`: what `capture_inputs` returned, without `sketch`. The kernels that it holds are those that are wrapped.
    - `preserve`: the last parts, with inputs of what is to be kept ("knowledge-preserved"), in place of the first, with
      inputs of the task ("instruction-previewed").
    - `damping`: what is added to the diagonal of $C$ to have an inverse, relative to its mean.
    - `key`: not used.

    **Raises** `ValueError` for a rank below one or above a kernel's, a dropout outside `[0, 1)`, inputs that were
    sketched, and for inputs of other kernels than those of this tree.

    Yang et al., [CorDA: Context-Oriented Decomposition Adaptation](https://arxiv.org/abs/2406.05223), NeurIPS 2024.
    """

    def new(c, w, *, rank, alpha, dropout):
        check(rank, dropout)
        check_part(w, rank)
        scale = scale_of(alpha, rank, rslora)
        mean = jnp.maximum(jnp.mean(jnp.diagonal(c)), jnp.finfo(c.dtype).tiny)  # an expert may have seen nothing
        c = c / mean + damping * jnp.eye(len(c))
        u, s, v = jnp.linalg.svd(c @ w.astype(jnp.float32), full_matrices=False)
        part = slice(-rank, None) if preserve else slice(rank)
        root = jnp.sqrt(s[part] / scale)
        a, b = jnp.linalg.solve(c, u[:, part]) * root[None], root[:, None] * v[part]
        return PiSSA.of(a, b, scale=scale, dropout=dropout)

    found = of_inputs(inputs, params)
    axes = {name: x.axes for name, x in found.items()}
    data = {name: x.covariance for name, x in found.items()}
    return wrap_with(params, new, data, axes, rank=rank, alpha=alpha, dropout=dropout)
