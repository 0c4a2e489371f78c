"""Mixtures of LoRA experts, of which a router picks for every token."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .._apply import apply
from .._node import Static, Trainable, widened
from .._targets import Option, Sites, Targets
from .._tree import Params, nodes_of, transform
from ..reparam._factors import check, factors, scale_of, uniform
from ._experts import Experts, largest
from ._taps import tap, tapped
from ._term import attach_terms


GATES = "jpeft_gates"


class MoELoRA(Experts):
    r"""$y' = y + s \sum_e g_e(x)\,x A_e B_e$ with $g(x) = \mathrm{softmax}(x R)$, of which the `top` largest stay.

    Those that stay are divided by their sum; where one alone stays it does not become 1, or the router $R$ would have
    no gradient.

    Dou et al., [LoRAMoE](https://arxiv.org/abs/2312.09979), ACL 2024, with all gates; Gao et al., [Higher Layers Need
    More LoRA Experts](https://arxiv.org/abs/2402.08562), 2024, and Li et al.,
    [MixLoRA](https://arxiv.org/abs/2404.15159), 2024, with the largest two.
    """

    router: Trainable[jax.Array, "in expert"]
    a: Trainable[jax.Array, "expert in rank"]
    b: Trainable[jax.Array, "expert rank out"]
    top: Static[int | None] = None

    def gates(self, x):
        shares = jax.nn.softmax(widened(x.reshape(-1, x.shape[-1]) @ self.router))
        chosen = largest(shares, self.top or shares.shape[-1])
        shares, chosen = tap(jnp.stack([shares, chosen]), GATES)
        gates = shares * chosen
        gates = gates if self.top in (None, 1) else gates / jnp.sum(gates, -1, keepdims=True)
        return gates.reshape(*x.shape[:-1], -1)


@transform
def moe_lora(
    params: Params,
    *,
    rank: Option = 8,
    experts: Option = 4,
    top: Option = None,
    alpha: Option = None,
    dropout: Option = 0.0,
    init: Option = "uniform",
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Add a mixture of trainable terms of low rank beside every targeted kernel. See `MoELoRA`.

    **Arguments:**

    - `rank`: of each expert; a number, or a mapping from patterns to numbers, as are `experts`, `top`, `alpha`,
      `dropout` and `init`.
    - `experts`: how many.
    - `top`: how many of them act on a token; all, if left out. `load_balance` keeps the router from always picking the
      same ones.
    - `alpha`, `dropout`, `init`: as for `lora`, of each expert.
    - `targets`, `sites`: which kernels. By default every one but the output head. Each must be the only one of a module
      that multiplies its input with it.
    - `key`: for the router and $A$; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for a `top` outside of the experts, for targets with every path that they do not fit, and as
    `lora` does.
    """

    def new(key, features_in, features_out, *, rank, experts, top, alpha, dropout, init):
        check(rank, dropout)
        if experts < 1 or (top is not None and not 1 <= top <= experts):
            raise ValueError(f"Of the experts, at least one, `top` are chosen: not {top} of {experts}.")
        key, own = jax.random.split(key)
        w = jax.ShapeDtypeStruct((features_in, features_out), jnp.float32)
        a, b = jax.vmap(lambda k: factors(k, w, rank, init))(jax.random.split(own, experts))
        router = uniform(key, (features_in, experts), features_in)
        return MoELoRA(router=router, a=a, b=b, scale=scale_of(alpha, rank), top=top, dropout=dropout)

    how = {"rank": rank, "experts": experts, "top": top, "alpha": alpha, "dropout": dropout, "init": init}
    return attach_terms(params, new, name="moe_lora", targets=targets, sites=sites, key=key, **how)


def load_balance(
    model: nn.Module, variables: Any, *args: Any, mask: jax.Array | None = None, **kwargs: Any
) -> tuple[Any, jax.Array]:
    r"""What `apply(model, variables, *args, **kwargs)` returns, and how unevenly its mixtures use their experts.

    $E \sum_e f_e P_e$, the mean over all layers, where $f_e$ is the share of expert $e$ in all choices of a batch, and
    $P_e$ the mean of its softmax. It is 1 where tokens are spread evenly, and $E$ where all take one expert. One call
    of the model gives both. Add the second, times 0.01 or so, to the loss.

    Fedus et al., [Switch Transformers](https://arxiv.org/abs/2101.03961), JMLR 2022, equations 4 to 6.

    **Arguments:**

    - `mask`: which tokens count, in the shape of the inputs but for their last axis, such as `(batch, sequence)`; all
      by default.

    **Raises** `ValueError` if no mixture of experts is in the tree, for a mask that does not fit, and where the model
    calls one inside of a branch or an unbounded loop.
    """
    nodes_of(variables, MoELoRA, "moe_lora")
    y, found = tapped(lambda: apply(model, variables, *args, **kwargs), GATES)
    return y, jnp.mean(jnp.concatenate([_unevenness(x, mask).reshape(-1) for x in found]))


def _unevenness(gates: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Of gates `(..., 2, tokens, expert)`: their softmax, and 1 where they were chosen."""
    *_, tokens, experts = gates.shape
    if mask is not None and mask.size != tokens:
        raise ValueError(f"The mask is {mask.shape}, and a mixture was called with {tokens} tokens.")
    counted = jnp.ones(tokens) if mask is None else mask.reshape(-1).astype(jnp.float32)
    shares, chosen = jnp.moveaxis(jnp.einsum("...te,t->...e", gates, counted / jnp.sum(counted)), -2, 0)
    return experts * jnp.sum(shares * chosen, -1) / jnp.sum(chosen, -1)
