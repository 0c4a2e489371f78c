"""PiSSA and OLoRA: LoRA that starts from a part of the kernel itself."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from .._node import Branch, Frozen, Static, Trainable
from .._operands import dropout as drop
from .._targets import Option, Sites, Targets
from .._tree import Params, transform, wrap
from ._factors import check, scale_of
from ._singular import check_part, principal


class PiSSA(Branch):
    r"""$W' = W + s\,(A B - A_0 B_0)$, where $s A_0 B_0$ is the part of $W$ that $A$ and $B$ start from.

    The residual $W - s A_0 B_0$ is not stored: the base stays what it was, and the start is exactly $W$.

    Meng et al., [PiSSA: Principal Singular Values and Singular Vectors Adaptation](https://arxiv.org/abs/2404.02948),
    NeurIPS 2024. Büyükakyüz, [OLoRA](https://arxiv.org/abs/2406.01775), 2024.
    """

    a: Trainable[jax.Array, "in rank"]
    b: Trainable[jax.Array, "rank out"]
    start_a: Frozen[jax.Array, "in rank"]
    start_b: Frozen[jax.Array, "rank out"]
    scale: Static[float]
    dropout: Static[float] = 0.0

    grows = ("rank",)
    scaled_by = ("b", "start_b")

    @classmethod
    def of(cls, a: jax.Array, b: jax.Array, **how: float) -> "PiSSA":
        """The node that starts at `a` and `b`."""
        return cls(a=a, b=b, start_a=a, start_b=b, **how)

    def weight(self, w):
        return w + self.scale * (self.a @ self.b - self.start_a @ self.start_b)

    def branch(self, x, key):
        return self.scale * (drop(x, self.dropout, key) @ self.a @ self.b - x @ self.start_a @ self.start_b)


def orthonormal_rows(w: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """`A = R[:rank].T` and `B = Q[:, :rank].T` of the QR decomposition of `w.T`, as torch holds the weight."""
    q, r = jnp.linalg.qr(w.T)
    return r[:rank].T, q[:, :rank].T


@transform
def pissa(
    params: Params,
    *,
    rank: Option = 8,
    alpha: Option = None,
    rslora: bool = False,
    dropout: Option = 0.0,
    iterations: int | None = None,
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    """LoRA that starts from the principal singular values and vectors of every targeted kernel. See `PiSSA`.

    **Arguments:** those of `lora`, but `init`, and

    - `iterations`: of a randomized decomposition, such as 4; by default the exact one.
    - `key`: for the randomized decomposition.

    **Raises** `ValueError` for a rank below one or above a kernel's, a dropout outside `[0, 1)`, and for targets as
    `wrap` does.
    """

    def start(key, w, rank, scale):
        a, b = principal(key, w, rank, iterations)
        return a / scale**0.5, b / scale**0.5

    return _from_part(params, start, rslora, targets, sites, key, rank=rank, alpha=alpha, dropout=dropout)


@transform
def olora(
    params: Params,
    *,
    rank: Option = 8,
    alpha: Option = None,
    rslora: bool = False,
    dropout: Option = 0.0,
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    """LoRA that starts from the QR decomposition of every targeted kernel, with orthonormal rows of B. See `PiSSA`.

    **Arguments:** those of `lora`, but `init`. `key` is not used.

    **Raises** `ValueError` as `pissa` does.
    """
    start = lambda key, w, rank, scale: orthonormal_rows(w, rank)
    return _from_part(params, start, rslora, targets, sites, key, rank=rank, alpha=alpha, dropout=dropout)


def _from_part(params: Params, start: Callable, rslora: bool, targets, sites, key, **given: Option) -> Params:
    """A `PiSSA` node of `start(key, w, rank, scale)` in place of every targeted kernel."""

    def new(key, w, *, rank, alpha, dropout):
        check(rank, dropout)
        check_part(w, rank)
        scale = scale_of(alpha, rank, rslora)
        a, b = start(key, w.astype(jnp.float32), rank, scale)
        return PiSSA.of(a, b, scale=scale, dropout=dropout)

    return wrap(params, new, targets=targets, sites=sites, key=key, **given)
