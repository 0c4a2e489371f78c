"""Arrow: trained LoRAs as experts, with a router that is made of them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from .._node import Frozen, Static, widened
from .._tree import Params
from ._experts import Experts, largest
from ._members import Members, members
from ._term import place_terms


class Arrow(Experts):
    r"""$y' = y + s \sum_e g_e(x)\,x A_e B_e$ with $g(x) = \mathrm{softmax}(|x V| / \tau)$ of the `top` largest.

    Column $v_e$ of $V$ is the input of norm 1 that $A_e B_e$ has the largest output for: its first singular vector.

    Ostapenko et al., [Towards Modular LLMs by Building and Reusing a Library of
    LoRAs](https://arxiv.org/abs/2405.11157), ICML 2024.
    """

    a: Frozen[jax.Array, "expert in rank"]
    b: Frozen[jax.Array, "expert rank out"]
    prototypes: Frozen[jax.Array, "in expert"]
    top: Static[int]
    temperature: Static[float] = 1.0

    def gates(self, x):
        scores = jnp.abs(widened(x @ self.prototypes))
        chosen = largest(scores, self.top)
        return jax.nn.softmax(scores / self.temperature, where=chosen > 0)


def arrow(
    trees: Sequence[Params], *, top: int = 3, temperature: float = 1.0, general: Sequence[Params] = ()
) -> Params:
    r"""One tree of many that `lora` has tuned on one base: each token goes through the LoRAs that fit it best.

    Nothing trains. See `Arrow`.

    **Arguments:**

    - `trees`: their ranks and scales may differ.
    - `top`: how many LoRAs act on a token.
    - `temperature`: $\tau$. The smaller it is, the more the best outweighs the others.
    - `general`: trees tuned on general texts, whose mean $A$ and $B$ are taken from those of every other one, as PEFT
      has it: what is left is what is special. Bagherifard et al.,
      [GenKnowSub](https://aclanthology.org/2025.acl-short.54), ACL 2025.

    **Raises** `ValueError` for a `top` outside of the trees, a temperature that is not above 0; and, with every path,
    for trees of different bases or targets, for nodes that are no LoRA, and for kernels as `moe_lora` does.
    """
    count = len(trees)
    if not 1 <= top <= count or not temperature > 0:
        raise ValueError(f"Of {count} trees `top` are chosen, at a temperature above 0: not {top=}, {temperature=}.")
    base, found = members([*trees, *general])

    def new(m: Members) -> Arrow:
        depth = m.a.ndim - 3
        a, b = (jnp.split(x, [count], depth) for x in (m.a, m.b))
        a, b = (x - jnp.mean(y, depth, keepdims=True) if general else x for x, y in (a, b))
        return Arrow(
            a=a, b=b, prototypes=_first_singular(a, b).mT, scale=m.scale, axes=m.axes, top=top, temperature=temperature
        )

    return place_terms(base, {path: new(m) for path, m in found.items()}, "arrow")


def _first_singular(a: jax.Array, b: jax.Array) -> jax.Array:
    """The first left-singular vectors `(..., in)` of `a @ b`, which is not formed."""
    q, r = jnp.linalg.qr(widened(a))
    u, _, _ = jnp.linalg.svd(r @ widened(b), full_matrices=False)
    return (q @ u[..., :1])[..., 0].astype(a.dtype)
