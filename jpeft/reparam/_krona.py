"""KronA: a Kronecker product of two full matrices."""

from typing import Literal

import jax
import jax.numpy as jnp

from .._node import Additive, Branch, Static, Trainable, cast
from .._targets import Option, Sites, Targets, one_of
from .._tree import Params, attach, transform, wrap
from ..places import FEED_FORWARD
from ._factors import uniform
from ._lokr import factorization


class KronA(Branch):
    r"""$W' = W + s\,(A \otimes B)$, and with a residual $W' = W + s\,(A \otimes B) + r I$, of a scalar $r$ that trains.

    $x (A \otimes B) = \mathrm{vec}(A^\top\,\mathrm{mat}(x)\,B)$: the product is not formed.

    Edalati et al., [KronA: Parameter Efficient Tuning with Kronecker Adapter](https://arxiv.org/abs/2212.10650), 2022.
    """

    a: Trainable[jax.Array, "in1 out1"]
    b: Trainable[jax.Array, "in2 out2"]
    residual: Trainable[jax.Array | None, ""] = None
    scale: Static[float] = 1.0

    def weight(self, w):
        w = w + self.scale * jnp.kron(self.a, self.b)
        return w if self.residual is None else w + self.residual * jnp.eye(len(w), dtype=w.dtype)

    def branch(self, x, key):
        return _through(self, x)


class ParallelKronA(Additive):
    r"""$y' = y + s\,x (A \otimes B)$ beside a feed-forward block of input $x$, and with a residual $+\,r x$."""

    a: Trainable[jax.Array, "in1 out1"]
    b: Trainable[jax.Array, "in2 out2"]
    residual: Trainable[jax.Array | None, ""] = None
    scale: Static[float] = 1.0

    def output(self, y, x, *args):
        return y + _through(cast(self, x.dtype), x).astype(y.dtype)


def _through(node: KronA | ParallelKronA, x: jax.Array) -> jax.Array:
    """The term of a node on activations: `(..., in)` -> `(..., out)`."""
    z = x.reshape(*x.shape[:-1], len(node.a), len(node.b))
    y = jnp.einsum("...ij,ip,jq->...pq", z, node.a, node.b)
    y = node.scale * y.reshape(*x.shape[:-1], -1)
    return y if node.residual is None else y + node.residual * x


@transform
def krona(
    params: Params,
    *,
    decompose_factor: Option = -1,
    scale: Option = 1.0,
    residual: bool = False,
    placement: Literal["kernel", "parallel"] = "kernel",
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Add a Kronecker product of two trainable matrices to every targeted kernel. See `KronA`.

    **Arguments:**

    - `decompose_factor`: the size of $A$ on both sides, where it is a divisor; -1 for divisors near the square root. A
      number, or a mapping from patterns to numbers, as is `scale`.
    - `scale`: $s$.
    - `residual`: whether a trained multiple of the input is added, which starts at zero. It needs as many inputs as
      outputs.
    - `placement`: `"kernel"`, or `"parallel"`, beside whole feed-forward blocks: see `ParallelKronA`.
    - `targets`, `sites`: which kernels, by default every one but the output head. For `"parallel"` which modules, by
      default the feed-forward blocks, found by their usual names.
    - `key`: for $A \sim U(\pm 1/\sqrt{in_1})$, beside $B = 0$; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for a residual between sides of different size, an unknown placement, and for targets as
    `wrap` and `attach` do.
    """
    one_of("placement", placement, ("kernel", "parallel"))

    def new(node, key, features_in, features_out, *, decompose_factor, scale):
        if residual and features_in != features_out:
            raise ValueError(
                f"The residual adds the input to the output: {features_in} features cannot be added to {features_out}. "
                "Leave these out of `targets`, or `residual` out."
            )
        (in1, in2), (out1, out2) = (factorization(n, decompose_factor) for n in (features_in, features_out))
        a, b = uniform(key, (in1, out1), in1), jnp.zeros((in2, out2))
        return node(a=a, b=b, residual=jnp.zeros(()) if residual else None, scale=scale)

    kernel = lambda key, w, **own: new(KronA, key, *w.shape, **own)
    beside = lambda key, *sizes, **own: new(ParallelKronA, key, *sizes, **own)
    how = {"sites": sites, "key": key, "decompose_factor": decompose_factor, "scale": scale}
    if placement == "kernel":
        return wrap(params, kernel, targets=targets, **how)
    return attach(params, beside, name="krona", targets=FEED_FORWARD if targets is None else targets, **how)
