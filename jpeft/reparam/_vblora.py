"""VB-LoRA: factors of low rank whose pieces are mixed of the vectors of one bank."""

import jax
import jax.numpy as jnp

from .._node import Frozen, Static, Trainable
from .._shared import share
from .._targets import Option, Sites, Targets
from .._tree import Params, default, map_nodes, transform, wrap
from ..selective._unfreeze import Free
from ._factors import check
from ._low_rank import LowRank
from ._sizes import check_divides


class VBLoRA(LowRank):
    r"""$W' = W + A B$: each piece of a column of $A$, and of a row of $B$, is $\sum_{v \in top} p_v\,V_v$.

    $V$ is the bank of vectors that all nodes share, $top$ the places of the largest `top` logits of that piece, and
    $p$ the softmax of these.

    Li et al., [VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks](https://arxiv.org/abs/2405.15179),
    NeurIPS 2024.
    """

    bank: Trainable[jax.Array, "vectors length"]
    logits_a: Trainable[jax.Array, "rank pieces vectors"]
    logits_b: Trainable[jax.Array, "rank pieces vectors"]
    top: Static[int]

    @property
    def left(self):
        return mixed(self.bank, *shares(self.logits_a, self.top)).mT

    @property
    def right(self):
        return mixed(self.bank, *shares(self.logits_b, self.top))

    def within(self, dtype):
        return self.at_rest().within(dtype)  # the choice first: of logits in bfloat16 many are equal

    def at_rest(self, task=None) -> "VBLoRAChoices":
        """The node with places of vectors and shares instead of logits."""
        kept = {"bank": self.bank, "scale": self.scale, "dropout": self.dropout, "base": self.base, "axes": self.axes}
        for side, logits in (("a", self.logits_a), ("b", self.logits_b)):
            part, places = shares(logits, self.top)
            smallest = jnp.uint8 if logits.shape[-1] <= 2**8 else jnp.uint32
            kept |= {f"shares_{side}": part[..., :-1], f"choices_{side}": places.astype(smallest)}
        return VBLoRAChoices(**kept)


class VBLoRAChoices(LowRank):
    """`VBLoRA` at rest: of every piece which vectors it is mixed of, and the shares of all but the last of them."""

    bank: Trainable[jax.Array, "vectors length"]
    choices_a: Frozen[jax.Array, "rank pieces top"]
    shares_a: Frozen[jax.Array, "rank pieces top_but_one"]
    choices_b: Frozen[jax.Array, "rank pieces top"]
    shares_b: Frozen[jax.Array, "rank pieces top_but_one"]

    @property
    def left(self):
        return mixed(self.bank, completed(self.shares_a), self.choices_a).mT

    @property
    def right(self):
        return mixed(self.bank, completed(self.shares_b), self.choices_b)


def shares(logits: jax.Array, top: int) -> tuple[jax.Array, jax.Array]:
    """The softmax of the `top` largest logits, and their places: both `(..., rank, pieces, top)`."""
    largest, places = jax.lax.top_k(logits, top)
    return jax.nn.softmax(largest), places


def completed(but_one: jax.Array) -> jax.Array:
    """Shares of which the last was left out: together they are one."""
    return jnp.concatenate([but_one, 1 - but_one.sum(axis=-1, keepdims=True)], axis=-1)


def mixed(bank: jax.Array, shares: jax.Array, places: jax.Array) -> jax.Array:
    """The rows `(..., rank, pieces * length)` of pieces that are mixed of vectors."""
    pieces = jnp.einsum("...k,...kl->...l", shares, bank[places])
    return pieces.reshape(*pieces.shape[:-2], -1)


@transform
def vblora(
    params: Params,
    *,
    rank: Option = 4,
    vectors: int = 256,
    length: int = 256,
    top: int = 2,
    dropout: Option = 0.0,
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Add a term of low rank, mixed of the vectors of one trainable bank, to every targeted kernel. See `VBLoRA`.

    The bank is at `params["jpeft_shared"]`. The start is near $W' = W$, and not exact.

    **Arguments:**

    - `rank`: the inner dimension of $A B$; a number, or a mapping from patterns to numbers, as is `dropout`.
    - `vectors`, `length`: how many vectors the bank has, and of how many numbers, which divide inputs and outputs.
    - `top`: of how many vectors a piece is mixed. Of one alone no logit would have a gradient.
    - `dropout`: the rate at which inputs of the term are dropped, where `apply` is given a `"dropout"` key.
    - `targets`, `sites`: which kernels. By default every one but the output head.
    - `key`: for logits $\sim N(0, 0.1^2)$ and a bank $\sim U(\pm 0.02)$; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for a rank below one, a `top` below 2 or above `vectors`, a length that does not divide a
    kernel, with every path, a dropout outside `[0, 1)`, and for targets as `wrap` does.
    """
    if not 2 <= top <= vectors:
        raise ValueError(f"VB-LoRA mixes from 2 to {vectors=} vectors, not {top=}.")
    check_divides(params, targets, sites, length=length)
    own, key = jax.random.split(default(key))
    bank = jax.random.uniform(own, (vectors, length), minval=-0.02, maxval=0.02)
    params, refs = share(params, vblora_bank=Free(array=bank))

    def new(key, w, *, rank, dropout):
        check(rank, dropout)
        logits = lambda key, size: 0.1 * jax.random.normal(key, (rank, size // length, vectors))
        a, b = (logits(k, size) for k, size in zip(jax.random.split(key), w.shape, strict=True))
        return VBLoRA(bank=refs["vblora_bank"], logits_a=a, logits_b=b, top=top, dropout=dropout)

    return wrap(params, new, targets=targets, sites=sites, key=key, rank=rank, dropout=dropout)


def vblora_choices(params: Params) -> Params:
    """The tree with every `VBLoRA` at rest, as `VBLoRAChoices`: places of vectors and shares instead of logits.

    It computes the same and is small in a file: of every piece `top` whole numbers and `top - 1` others are left of
    its `vectors` logits. What was not chosen is forgotten, so that training cannot be resumed from it: only the bank
    can be trained on.

    **Raises** `ValueError` if there is no `VBLoRA` node in the tree.
    """
    return map_nodes(VBLoRA.at_rest, params, VBLoRA, "vblora")
