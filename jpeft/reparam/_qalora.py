"""QA-LoRA: a term of low rank that the zero points of a quantized kernel can take in."""

from typing import Literal

import jax
import jax.numpy as jnp

from .._node import Branch, Static, Trainable
from .._operands import dropout as drop
from .._targets import Option, Sites, Targets, one_of
from .._tree import Params, map_nodes, nodes_of, transform, wrap
from ..quantized._int4 import Int4
from ._factors import check, factors, scale_of


class QALoRA(Branch):
    r"""$W' = W + s\,A_{g(i)} B$: the inputs $i$ of a group $g(i)$ share a row of $A$.

    On activations $y = x W + s\,\bar x A B$ with the sums $\bar x$ of the inputs of each group.

    Xu et al., [QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language
    Models](https://arxiv.org/abs/2309.14717), ICLR 2024.
    """

    a: Trainable[jax.Array, "groups rank"]
    b: Trainable[jax.Array, "rank out"]
    group: Static[int]
    scale: Static[float] = 1.0
    dropout: Static[float] = 0.0

    def weight(self, w):
        return w + self.scale * jnp.repeat(self.a, self.group, axis=0)[: len(w)] @ self.b

    def branch(self, x, key):
        x = drop(x, self.dropout, key)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % self.group)])
        return self.scale * (x.reshape(*x.shape[:-1], -1, self.group).sum(axis=-1) @ self.a) @ self.b


@transform
def qalora(
    params: Params,
    *,
    rank: Option = 8,
    alpha: Option = None,
    group: Option = 64,
    dropout: Option = 0.0,
    pooling: Literal["sum", "peft"] = "sum",
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Add a trainable term of low rank, constant within groups of inputs, to every targeted kernel. See `QALoRA`.

    On `int4` kernels of the same `group` it can be merged without a loss: `merge_into_zeros`.

    **Arguments:**

    - `rank`: the inner dimension of $A B$; a number, or a mapping from patterns to numbers, as are `alpha`, `group` and
      `dropout`.
    - `alpha`: the term is scaled by $s$ = `alpha / rank`. Left out, $s = 1$.
    - `group`: how many inputs share a row of $A$: the group of the quantized kernel.
    - `dropout`: the rate at which inputs of the term are dropped, where `apply` is given a `"dropout"` key.
    - `pooling`: `"sum"`, the paper's; `"peft"` multiplies the means of the groups by the number of groups, as Hugging
      Face's PEFT does, and so $s$ by groups over group.
    - `targets`, `sites`: which kernels. By default every one but the output head.
    - `key`: for $A \sim U(\pm 1/\sqrt{groups})$, beside $B = 0$; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for a rank or a group below one, a dropout outside `[0, 1)`, an unknown pooling, and for
    targets as `wrap` does.
    """
    one_of("pooling", pooling, ("sum", "peft"))

    def new(key, w, *, rank, alpha, group, dropout):
        check(rank, dropout)
        if group < 1:
            raise ValueError(f"A group has at least one input, not {group}.")
        pooled = w[::group]
        a, b = factors(key, pooled, rank, "uniform")
        scale = scale_of(alpha, rank) * (len(pooled) / group if pooling == "peft" else 1)
        return QALoRA(a=a, b=b, group=group, scale=scale, dropout=dropout)

    how = {"rank": rank, "alpha": alpha, "group": group, "dropout": dropout}
    return wrap(params, new, targets=targets, sites=sites, key=key, **how)


def merge_into_zeros(params: Params) -> Params:
    r"""The tree with every `QALoRA` on `int4` folded into the zero points: $z' = z - s\,A B / scale$. No code changes.

    Zero points are float32 then: `4 + 64 / group` bits a weight.

    **Raises** `ValueError`, with every path, for a `QALoRA` on another base, or of other groups than its base's; and
    where there is none.
    """
    nodes = nodes_of(params, QALoRA, "qalora")
    faults = [f"  {name}: {fault}" for name, x in nodes.items() if (fault := _fault(x))]
    if faults:
        raise ValueError("\n".join(["There must be QA-LoRA on int4 kernels, of the same groups:", *faults]))
    return map_nodes(_into_zeros, params, QALoRA)


def _fault(node: QALoRA) -> str | None:
    if not isinstance(node.base, Int4):
        return f"its base is {type(node.base).__name__}"
    size = 2 * node.base.codes.shape[-2] // node.base.scale.shape[-2]
    return None if size == node.group else f"its group is {node.group}, its base's {size}"


def _into_zeros(node: QALoRA) -> Int4:
    base, change = node.base, node.scale * node.a @ node.b
    zero = jnp.full_like(base.scale, 8) if base.zero is None else base.zero.astype(base.scale.dtype)
    scale = jnp.where(base.scale == 0, 1.0, base.scale)  # of a group of zeros, whose codes are all its zero point
    return base.replace(zero=zero - change / scale, scale=scale)
