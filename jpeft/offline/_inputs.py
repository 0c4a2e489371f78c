"""What kernels are multiplied with: sums over the rows of their inputs."""

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from .._shared import Shared
from .._targets import Sites, Targets, kernels, named_leaves
from .._tree import Params, map_nodes, wrap
from ._probe import Probe, new_probe, omega
from ._run import Batch, Running, compiled, run
from ._values import filled


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    r"""Sums over all rows $x$ of the inputs $X$ `(rows, in)` of a kernel; every array has its stacked axes first."""

    count: jax.Array  # how many rows
    total: jax.Array  # (in,): the sum of rows
    energy: jax.Array  # the sum of $\|x\|^2$
    product: jax.Array  # (in, sketch): X^T X Omega, where Omega is the identity unless it was sketched
    axes: str = dataclasses.field(metadata={"static": True})  # the letters of the kernel's axes

    @property
    def covariance(self) -> jax.Array:
        """$X^T X$ `(in, in)`, not divided by the number of rows.

        **Raises** `ValueError` if it was sketched.
        """
        if self.product.shape[-1] < self.product.shape[-2]:
            raise ValueError(f"Of X^T X only a sketch of {self.product.shape} was kept: leave `sketch` out.")
        return self.product

    def principal(self, rank: int, *, centered: bool = False) -> tuple[jax.Array, jax.Array]:
        r"""The largest eigenvalues `(rank,)` of $X^T X$, with eigenvectors `(in, rank)`: right-singular ones of $X$.

        `centered` takes the mean row from every row first. Of a sketch they are those of Nyström's approximation
        $Y (\Omega^T Y)^+ Y^T$ with $Y = X^T X \Omega$, which is exact where the rank is at most `sketch`: Tropp et al.,
        [Fixed-rank approximation of a positive-semidefinite matrix](https://arxiv.org/abs/1706.05736), 2017.
        """
        signs = omega(*self.product.shape[-2:])
        times = (lambda m: m) if signs is None else (lambda m: m @ signs)
        y = self.product
        if centered:
            mean = self.total / jnp.maximum(self.count, 1)[..., None]  # an expert may have seen no rows
            y = y - self.total[..., None] * times(mean)[..., None, :]
        values, vectors = jnp.linalg.eigh(times(y.mT))
        kept = values > values[..., -1:] * (y.shape[-1] * jnp.finfo(y.dtype).eps)
        roots = jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, values, jnp.ones_like(values))), jnp.zeros_like(values))
        u, s, _ = jnp.linalg.svd(y @ vectors * roots[..., None, :], full_matrices=False)
        return jnp.square(s[..., :rank]), u[..., :rank]

    def variance(self, *, centered: bool = False) -> jax.Array:
        """The sum of all eigenvalues of $X^T X$."""
        if not centered:
            return self.energy
        return self.energy - jnp.sum(jnp.square(self.total), -1) / jnp.maximum(self.count, 1)


def capture_inputs(
    forward: Callable[[Params, Batch], Any],
    params: Params,
    batches: Iterable[Batch],
    *,
    mask: Callable[[Batch], jax.Array] | None = None,
    sketch: int | None = None,
    targets: Targets | None = None,
    sites: Sites | None = None,
    **running: Unpack[Running],
) -> Params:
    r"""Sums over the rows that every targeted kernel is multiplied with: their number, mean and $X^T X$. See `Inputs`.

    In the gradient of whatever the model returns, a node on the kernel gives $X^T X$ for its own: so sums come out of
    scanned, rematerialized and compiled layers, of experts, and of kernels that are used more than once. The backward
    pass is of that node alone: no gradient of the model is computed.

    **Arguments:**

    - `forward`: `(params, batch)` to what the model returns, or a loss, by `jpeft.apply`. What is returned must depend,
      differentiably, on every targeted kernel.
    - `batches`: pytrees whose first axis is examples, of any number and size.
    - `mask`: from a batch, which positions count, such as `lambda batch: batch["mask"]`: boolean or numbers, in the
      shape of the inputs but for their last axis, or flat. By default all of them.
    - `sketch`: keep $X^T X \Omega$ `(in, sketch)` with random signs $\Omega$ instead of $X^T X$ `(in, in)`. What is
      then found is exact where $X$ has no higher rank, and else better the faster its singular values fall off. Take
      some times as many as there are directions to be found.
    - `targets`, `sites`: which kernels. By default every one but the output head.
    - `running`: `progress`, `resume` and `save_every`. See the page on offline passes.

    **Returns** the parameters' nested structure with an `Inputs` for every target, and `None` elsewhere.

    **Raises** `ValueError` if there are no batches, for targets as `lora` does, with the paths of kernels whose inputs
    were not seen, for a mask that does not fit, and for a `resume` of another pass.
    """
    axes = kernels(params, targets, sites)
    options = {"sketch": sketch, "path": {re.escape(name): name for name in axes}}

    def probed(params):
        tree = wrap(params, new_probe, targets=targets, sites=sites, **options)
        return tree, {name: x.moment for name, x in named_leaves(tree).items() if name in axes}

    @compiled
    def step(total, params, batch):
        tree, moments = probed(params)
        counted = None if mask is None else Shared(mask(batch))

        def returned(moments):
            there = lambda x: x.replace(moment=moments[x.path], mask=counted)
            out = jax.tree.leaves(forward(map_nodes(there, tree, Probe), batch))
            return sum(jnp.sum(x.astype(jnp.float32)) for x in out if jnp.issubdtype(x.dtype, jnp.inexact))

        return jax.tree.map(lambda x, y: x + y.real, total, jax.grad(returned)(moments))

    start = jax.tree.map(lambda x: jnp.zeros(x.shape), jax.eval_shape(probed, params)[1])
    total = run(step, start, params, batches, what="capture_inputs", options={"sketch": sketch}, **running)
    found = {name: _inputs(total[name], axes[name]) for name in axes}
    unseen = [name for name, x in found.items() if not jnp.any(x.count)]
    if unseen:
        raise ValueError(
            f"No inputs of these kernels were seen: {', '.join(unseen)}.\n"
            "`forward` must call the model by `jpeft.apply`, and what it returns must depend, differentiably, on all "
            "`targets`. Lookups and convolutions have no rows: leave them out."
        )
    return filled(params, found)


def _inputs(moment: jax.Array, axes: str) -> Inputs:
    rows, last = moment[..., :-1, :], moment[..., -1, :]
    return Inputs(count=last[..., -2], total=rows[..., -2], energy=last[..., -1], product=rows[..., :-2], axes=axes)
