"""EVA: LoRA whose first factor is what its inputs vary along, and whose ranks are where that explains most."""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from .._targets import Option, options
from .._tree import Params, transform
from ._factors import check, scale_of
from ._from_data import of_inputs, wrap_with
from ._lora import LoRA


TINY = jnp.finfo(jnp.float32).tiny  # the variance of an expert that has seen nothing
ROUNDING = 1e-4  # a variance below so much of the sum of squares is no more than what rounding leaves of a difference


@transform
def eva(
    params: Params,
    *,
    inputs: Params,
    rank: Option = 8,
    rho: float = 2.0,
    alpha: Option = None,
    rslora: bool = False,
    dropout: Option = 0.0,
    whiten: bool = False,
    centered: bool = False,
    key: jax.Array | None = None,
) -> Params:
    r"""LoRA with the top right-singular vectors of a kernel's inputs as $A$, and $B = 0$. See `LoRA`.

    A kernel's rank is how many of its directions are among those that explain the largest share of the variance of
    their inputs, over all kernels: $\sum r$ of them are kept in all, and $\rho r$ at most of one kernel. A kernel that
    gets none stays as it was. The kernels of a stack have one rank: the n-th directions of all its layers are kept
    together or not at all, for the mean of their shares.

    **Arguments:**

    - `inputs`: what `capture_inputs` returned. The kernels that it holds are those that are wrapped.
    - `rank`: $r$, the mean rank; it, `alpha` and `dropout` are a value, or a mapping from patterns to values.
    - `rho`: $\rho$, at least 1, where every rank is $r$.
    - `alpha`, `rslora`: $s$ is that of `lora` with the rank $r$, whatever the kernel's own has become.
    - `dropout`: as for `lora`.
    - `whiten`: divide each direction by the root of its singular value.
    - `centered`: take the mean from the inputs first, as PEFT does.
    - `key`: not used.

    **Raises** `ValueError` for a `rho` below 1, a rank below one or above the number of directions that were kept, a
    dropout outside `[0, 1)`, and for inputs of other kernels than those of this tree.

    Paischer et al., [Explained Variance Adaptation](https://arxiv.org/abs/2410.07170), 2024.
    """
    if rho < 1:
        raise ValueError(f"`rho` is at least 1, not {rho}.")
    found = of_inputs(inputs, params)
    ranks = {name: how["rank"] for name, how in options({"rank": rank}, list(found)).items()}
    spectra = {}
    for name, x in found.items():
        check(ranks[name])
        most = x.product.shape[-1]
        if ranks[name] > most:
            raise ValueError(f"Of the inputs of {name!r} {most} directions were kept: no rank of {ranks[name]}.")
        spectra[name] = x.principal(min(round(rho * ranks[name]), most), centered=centered)
    whole = {name: jnp.maximum(x.variance(centered=centered), ROUNDING * x.energy + TINY) for name, x in found.items()}
    given = redistributed({name: values / whole[name][..., None] for name, (values, _) in spectra.items()}, ranks)

    def new(spectrum, w, *, own, rank, alpha, dropout):
        check(rank, dropout)
        values, a = (x[..., :own] for x in spectrum)
        if whiten:
            a = a / jnp.where(values > 0, values, jnp.ones_like(values))[None] ** 0.25
        return LoRA(a=a, b=jnp.zeros((own, w.shape[1])), scale=scale_of(alpha, rank, rslora), dropout=dropout)

    data = {name: x for name, x in spectra.items() if given[name]}
    axes = {name: x.axes for name, x in found.items()}
    own = {re.escape(name): n for name, n in given.items()}
    return wrap_with(params, new, data, axes, own=own, rank=rank, alpha=alpha, dropout=dropout)


def redistributed(shares: Mapping[str, jax.Array], ranks: Mapping[str, int]) -> dict[str, int]:
    """The rank of every kernel: how many of its `shares` `(stack..., directions)` are among the largest of all.

    `sum(ranks)` are taken in all, of a stack as many at once as there are kernels in it.
    """
    sizes = {name: x.size // x.shape[-1] for name, x in shares.items()}
    means = {name: jnp.mean(x.reshape(-1, x.shape[-1]), 0) for name, x in shares.items()}
    left = sum(ranks[name] * n for name, n in sizes.items())
    taken = dict.fromkeys(shares, 0)
    for name, _ in sorted(((n, float(x)) for n, xs in means.items() for x in xs), key=lambda one: -one[1]):
        if sizes[name] <= left:
            taken[name] += 1
            left -= sizes[name]
    return taken
