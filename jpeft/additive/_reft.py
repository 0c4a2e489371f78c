"""ReFT: edits of hidden states within a subspace, at chosen positions."""

import re
from typing import Literal

import jax
import jax.numpy as jnp

from .._kernel import stacked
from .._node import Static, Trainable, widened
from .._operands import dropout as drop
from .._targets import Option, Sites, Targets, no_match, one_of
from .._tree import Params, attach, modules, place, transform
from ..places import BLOCK
from ._bottleneck import affine
from ._hidden import Hidden
from ._positions import Positions, chosen


class ReFT(Hidden):
    r"""$f(h) = (h W + b - h R)\,R^\top$ at the chosen positions, and 0 elsewhere. See `Hidden`.

    With orthonormal columns of $R$ it is LoReFT: then $h' R = h W + b$, and what is orthogonal to them stays.

    Wu et al., [ReFT: Representation Finetuning for Language Models](https://arxiv.org/abs/2404.03592), NeurIPS 2024.

    **Fields:**

    - `rotation`: $R$; or, if `orthonormal`, the vectors of reflections $H_i = I - 2 v_i v_i^\top / |v_i|^2$, and $R$ is
      the first columns of $H_1 \cdots H_r$.
    - `subtract`: whether $h R$ is subtracted. DiReFT leaves it out.
    - `first`, `last`: how many tokens at the start and at the end of a prompt; `None` for all positions.
    """

    rotation: Trainable[jax.Array, "in rank"]
    source: Trainable[jax.Array, "in rank"]
    bias: Trainable[jax.Array, "rank"]
    orthonormal: Static[bool] = True
    subtract: Static[bool] = True
    first: Static[int | None] = None
    last: Static[int | None] = None

    def within(self, dtype):
        # Rounded vectors are other reflections, and of W - R rounding W and R would leave nothing right.
        return super().within(dtype).replace(rotation=self.rotation, source=self.source)

    def change(self, h, key):
        r, source = self.columns(), widened(self.source)
        source = (source - r if self.subtract else source).astype(h.dtype)
        f = drop(affine(h, source, self.bias) @ r.astype(h.dtype).T, self.dropout, key)
        if self.first is None:
            return f
        return jnp.where(chosen(self.first, self.last, h.shape)[..., None], f, jnp.zeros_like(f))

    def at_rest(self, task=None):
        if not self.orthonormal:
            return self
        return self.replace(rotation=stacked(ReFT.columns, self.bias.ndim - 1)(self), orthonormal=False)

    def columns(self) -> jax.Array:
        """$R$, in float32 at least."""
        return reflected(widened(self.rotation)) if self.orthonormal else widened(self.rotation)


def reflected(v: jax.Array) -> jax.Array:
    r"""The first `rank` columns of $H_1 \cdots H_{rank}$, where $H_i$ reflects along a column of `v (features, rank)`.

    They are orthonormal for every `v`. The product is $I - V S^{-1} V^\top$, where $S$ is the part of $V^\top V$ above
    the diagonal, and half of its diagonal.
    """
    rank = v.shape[1]
    with jax.default_matmul_precision("highest"):
        gram = v.T @ v
        s = jnp.triu(gram) - jnp.diag(jnp.diagonal(gram)) / 2
        return jnp.eye(*v.shape, dtype=v.dtype) - v @ jax.scipy.linalg.solve_triangular(s, v[:rank].T)


# method -> whether R is orthonormal, and whether h R is subtracted
METHODS = {
    "loreft": (True, True),
    "noreft": (False, True),
    "direft": (True, False),
    "nodireft": (False, False),
}


@transform
def reft(
    params: Params,
    *,
    rank: Option = 4,
    method: Literal["loreft", "noreft", "direft", "nodireft"] = "loreft",
    positions: str = "f1+l1",
    init: Literal["random", "identity"] = "random",
    dropout: Option = 0.0,
    targets: Targets = BLOCK,
    within: str = "",
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Edit what layers return, in a subspace of `rank` dimensions, at some positions of the prompt. See `ReFT`.

    **Arguments:**

    - `rank`: the number of columns of $R$; a number, or a mapping from patterns of module paths to numbers, as is
      `dropout`.
    - `method`: `"loreft"`: $(h W + b - h R) R^\top$ with orthonormal columns of $R$; `"noreft"`: the same with any $R$;
      `"direft"`: $(h W + b) R^\top$ with orthonormal columns; `"nodireft"`: with any $R$, which AdapterHub calls
      DiReFT.
    - `positions`: `"f3+l2"`, the first 3 and the last 2 tokens of every prompt, wherever its padding is; `"f3"`;
      `"l2"`; or `"all"`, also while decoding. `Positions` says which tokens are the prompt's. First and last share
      their arrays: `jpeft.chain(jpeft.reft(positions="f3"), jpeft.reft(positions="l2"))` has arrays for each.
    - `init`: `"random"`: of linear layers, and a random $R$, as the authors have it: the model is another one from the
      start. `"identity"`: $b = 0$, and $W = R$, or $W = 0$ where $h R$ is not subtracted: the model is unchanged.
    - `dropout`: of the edit, where `apply` is given a `"dropout"` key.
    - `targets`: paths of modules that return `(batch, seq, features)`, or a tuple whose first is; by default layers.
    - `within`: the path of the module that takes the mask, by default the model itself. Name it where the model has an
      encoder and a decoder.
    - `sites`: tells the features of layers. They own no kernel, so that it must be given by default.
    - `key`: for `init`; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for unknown options, a rank below one or above the features, a dropout outside `[0, 1)`, and
    for targets as `attach` does.
    """
    one_of("method", method, METHODS)
    one_of("init", init, ("random", "identity"))
    orthonormal, subtract = METHODS[method]
    first, last = _parsed(positions)

    def new(key, features_in, features_out, *, rank, dropout):
        if not 1 <= rank <= features_out or not 0 <= dropout < 1:
            raise ValueError(f"ReFT has ranks from 1 to {features_out}, dropout in [0, 1), not {rank=}, {dropout=}.")
        shape, bound = (features_out, rank), features_out**-0.5
        keys = jax.random.split(key, 3)
        uniform = lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        node = ReFT(
            rotation=jax.random.normal(keys[0], shape) if orthonormal else uniform(keys[0], shape),
            source=uniform(keys[1], shape),
            bias=uniform(keys[2], (rank,)),
            orthonormal=orthonormal,
            subtract=subtract,
            first=first,
            last=last,
            dropout=dropout,
        )
        if init == "random":
            return node
        return node.replace(source=node.columns() if subtract else jnp.zeros(shape), bias=jnp.zeros(rank))

    params = attach(params, new, name="reft", targets=targets, sites=sites, key=key, rank=rank, dropout=dropout)
    if first is None:
        return params
    if within not in modules(params):
        raise no_match([within], list(modules(params)), "module")
    if any(isinstance(x, Positions) for x in modules(params)[within].values()):
        return params
    return place(params, {within: Positions()}, "reft_positions")


def _parsed(positions: str) -> tuple[int | None, int | None]:
    """How many first and last tokens; `None` twice for all."""
    if positions == "all":
        return None, None
    counts = dict(re.findall(r"([fl])([1-9]\d*)", positions))
    if not counts or "+".join(f"{side}{count}" for side, count in counts.items()) != positions:
        raise ValueError(f"`positions` is {positions!r}: 'all', or the first and last tokens, such as 'f3+l2' or 'l1'.")
    return int(counts.get("f", 0)), int(counts.get("l", 0))
