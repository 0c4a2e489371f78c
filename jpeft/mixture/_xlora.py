"""X-LoRA: what the model makes of a text by itself says how LoRAs are mixed for each of its tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .._apply import apply
from .._node import Additive, Static, Trainable, cast, widened
from .._operands import dropout as drop
from .._operands import fold_in
from .._targets import Sites, Targets
from .._tree import Params, attach, nodes_of
from ..additive._bottleneck import affine
from ..compose._stack import stack
from ..compose._stacked import StackedBranches
from ..places import FINAL_NORM
from ..reparam._factors import uniform
from ._experts import largest
from ._taps import tap, tapped


GATES = "jpeft_xlora"


class XLoRA(Additive):
    r"""$g = \mathrm{softmax}(F(h) / T)$ of the last hidden states $h$: a weight of every adapter for every token.

    $F$ is of linear layers with ReLUs between them. No gradient goes to $h$.

    Buehler and Buehler, [X-LoRA: Mixture of Low-Rank Adapter Experts](https://arxiv.org/abs/2402.07148), 2024.
    """

    layers: Trainable[Any]  # (kernel (in, out), bias (out,)) of each
    temperature: Static[float] = 1.0
    top: Static[int | None] = None
    renormalize: Static[bool] = False
    scale: Static[float] = 1.0
    dropout: Static[float] = 0.0

    def around(self, call, key, *args, **kwargs):
        result = call(*args, **kwargs)
        h = result[0] if isinstance(result, tuple) else result
        tap(self.gates(jax.lax.stop_gradient(h), key), GATES)
        return result

    def gates(self, h: jax.Array, key: jax.Array | None) -> jax.Array:
        """`(batch, tokens, features)` -> `(batch, tokens, adapters)`, in float32 at least."""
        *inner, last = cast(self.layers, h.dtype)
        for n, layer in enumerate(inner):
            h = drop(jax.nn.relu(affine(h, *layer)), self.dropout, fold_in(key, n))
        shares = jax.nn.softmax(widened(affine(h, *last)) / self.temperature)
        if self.top is not None:
            chosen = largest(shares, self.top)
            shares = shares * chosen
            if self.renormalize:
                shares = jax.nn.softmax(jnp.where(chosen > 0, shares, -jnp.inf))
        return self.scale * shares


def xlora(
    trees: Sequence[Params] | Mapping[str, Params],
    *,
    depth: int = 1,
    width: int = 2048,
    temperature: float = 1.0,
    top: int | None = None,
    renormalize: bool = False,
    scale: float = 1.0,
    dropout: float = 0.0,
    targets: Targets = FINAL_NORM,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""One tree of several that were tuned on one base, which do not train, and a trainable network that mixes them.

    See `XLoRA`. Call the model by `apply_xlora`: it runs twice, without adapters for $h$, and with them mixed.

    **Arguments:**

    - `trees`: the adapters, as `stack` takes them: LoRAs, or others of kernels.
    - `depth`, `width`: of the network: how many linear layers, and how wide those between them are.
    - `temperature`: $T$.
    - `top`: how many adapters act on a token; all if left out. The weights of others become 0.
    - `renormalize`: whether those that stay go through a softmax once more, as PEFT's `enable_softmax_topk`.
    - `scale`: of all weights.
    - `dropout`: behind each ReLU, where the call is given a `"dropout"` key.
    - `targets`: the module that returns the last hidden states, by default the last norm, found by its usual names.
    - `sites`: tells the features of that module. It must be given.
    - `key`: for the network; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for sizes below one, a `top` outside of the adapters, a temperature that is not above 0, a
    dropout outside `[0, 1)`, for `targets` that are not one module, and as `stack` and `attach` do.
    """
    params = stack(trees, freeze=True)
    count = len(trees)
    if depth < 1 or width < 1 or temperature <= 0 or not 0 <= dropout < 1 or not 1 <= (top or count) <= count:
        raise ValueError(
            "X-LoRA has at least one layer, a width of at least 1, a temperature above 0, dropout in [0, 1) and a "
            f"`top` of 1 to {count} adapters, not {depth=}, {width=}, {temperature=}, {dropout=}, {top=}."
        )

    def new(key, features_in, features_out):
        sizes = [features_out, *[width] * (depth - 1), count]
        keys = jax.random.split(key, depth)
        layers = [_linear(k, i, o) for k, i, o in zip(keys, sizes[:-1], sizes[1:], strict=True)]
        how = {"temperature": temperature, "top": top, "renormalize": renormalize, "scale": scale, "dropout": dropout}
        return XLoRA(layers=tuple(layers), **how)

    params = attach(params, new, name="xlora", targets=targets, sites=sites, key=key)
    if len(found := nodes_of(params, XLoRA)) > 1:
        raise ValueError(f"Which module returns the last hidden states? `targets` matches {len(found)}: {list(found)}.")
    return params


def apply_xlora(model: nn.Module, variables: Any, *args: Any, **kwargs: Any) -> Any:
    """`apply(model, variables, *args, **kwargs)` with the weights that the tree's `XLoRA` gives every token.

    A `cache` is a pair, of the pass without adapters and of that with them, such as `(empty, empty)` of an empty one;
    the pair is returned beside the logits.

    **Raises** `ValueError` for a tree that `xlora` has not made, and for a cache that is no pair.
    """
    nodes_of(variables, XLoRA, "xlora")
    count = len(next(iter(nodes_of(variables, StackedBranches, "stack").values())).names)
    caches = kwargs.pop("cache", None)
    if caches is not None and not (type(caches) is tuple and len(caches) == 2):
        raise ValueError("X-LoRA runs the model twice, and has two caches: cache=(empty, empty) to begin with.")

    def run(adapters, which):
        cache = {} if caches is None else {"cache": caches[which]}
        return apply(model, variables, *args, adapters=adapters, **kwargs, **cache)

    first, (gates,) = tapped(lambda: run(jnp.zeros(count), 0), GATES)
    result = run(gates, 1)
    return result if caches is None else (result[0], (first[1], result[1]))


def _linear(key: jax.Array, features_in: int, features_out: int) -> tuple[jax.Array, jax.Array]:
    kernel, bias = jax.random.split(key)
    return uniform(kernel, (features_in, features_out), features_in), uniform(bias, (features_out,), features_in)
