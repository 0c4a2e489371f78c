"""LLaMA-Adapter: attention to a trainable prompt, beside that to the tokens, through a gate that opens from zero."""

import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp

from .._node import Additive, Frozen, Trainable
from .._targets import Call, Sites, Targets
from .._tree import Params, default, place, transform
from ..places import ATTENTION
from ..selective._layers import LAYERS
from ._prefix import called
from ._prefix_nodes import apart, set_apart


class LlamaAdapter(Additive):
    r"""$y' = y + g\,A(x, P)$, where $A$ is the attention that the node stands beside, and $y$ its own result.

    $A(x, P) = O\,\mathrm{softmax}(q K_P^\top / \sqrt{w})\,V_P$ with $q$ of $x$ as for the tokens, and $K_P$ and $V_P$
    of $P$ through the module's own projections, whatever nodes those have. The prompt has no positions, so that its
    keys are not rotated, and all of it is seen. No prefix is before it.

    Zhang et al., [LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init
    Attention](https://arxiv.org/abs/2303.16199), ICLR 2024.
    """

    prompt: Trainable[jax.Array, "length features"]
    gate: Trainable[jax.Array]
    among: Frozen[Any] = None  # of stacked layers: 1 where they have it, and 0 where not

    def around(self, call, key, *args, **kwargs):
        if apart():
            return call(*args, **kwargs)
        given = inspect.signature(call).bind(*args, **kwargs)
        if "context" not in given.signature.parameters:
            raise ValueError(
                "LLaMA-Adapter has attention attend to its prompt: the module's call must have an argument `context`, "
                f"(batch, length, features), for what else than its input is attended to. It has {given.signature}."
            )
        result = call(*args, **kwargs)
        y, *rest = result if isinstance(result, tuple) else (result,)
        x = given.args[0]
        prompt = jnp.broadcast_to(self.prompt.astype(x.dtype), (len(x), *self.prompt.shape))
        given.arguments |= {"context": prompt} | {n: None for n in ("mask", "cache") if n in given.arguments}
        gate = self.gate if self.among is None else self.gate * self.among
        with set_apart(True):
            seen = call(*given.args, **given.kwargs)
        y = y + gate.astype(y.dtype) * seen
        return (y, *rest) if isinstance(result, tuple) else y


@transform
def llama_adapter(
    params: Params,
    *,
    length: int = 10,
    layers: int | None = None,
    targets: Targets = ATTENTION,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Let attention see a trainable prompt of `length`, through a gate. See `LlamaAdapter`.

    **Arguments:**

    - `length`: of the prompt, of each layer its own.
    - `layers`: how many of the last have it; all if left out. Of layers that are stacked all compute it, and the gate
      of the others stays closed.
    - `targets`: paths of attention modules, by default found by their usual names. Their call has an argument
      `context`, as the library's own has.
    - `sites`: tells the features. It must be given.
    - `key`: for $P \sim N(0, 1)$; `jax.random.key(0)` if left out. $g = 0$.

    **Raises** `ValueError` for a length below one, more layers than there are, and targets that match no module of
    `sites`.
    """
    if length < 1 or (layers is not None and layers < 1):
        raise ValueError(f"A prompt has at least one vector, in at least one layer, not {length=} and {layers=}.")
    found = called(targets, sites)
    found = found if layers is None else _last(found, layers)
    nodes = {}
    for (path, call), k in zip(found.items(), jax.random.split(default(key), len(found)), strict=True):
        prompt = jax.random.normal(k, (*call.stack, length, call.features_in))
        among = None if layers is None or not call.stack else _among(call.stack, layers)
        nodes[path] = LlamaAdapter(prompt=prompt, gate=jnp.zeros(call.stack), among=among)
    return place(params, nodes, "llama_adapter")


def _last(found: dict[str, Call], layers: int) -> dict[str, Call]:
    """Those of the modules that are in the last layers; all that are stacked."""
    at, numbers = {}, {}  # what layers a module is in, and what there are beside
    for path, call in found.items():
        match = re.fullmatch(LAYERS, path, re.IGNORECASE)
        if match is None:
            raise ValueError(f"Which layer is {path!r} in? `layers` is for modules in `layers_3/...` or `layers/...`.")
        own = set(range(call.stack[0]) if call.stack else [int(match["layer"])])
        at[path] = own, numbers.setdefault(match["stack"], set())
        at[path][1].update(own)
    if few := {stack: len(beside) for stack, beside in numbers.items() if len(beside) < layers}:
        raise ValueError(f"`layers` is {layers}, and there are fewer: {few}.")
    return {path: found[path] for path, (own, beside) in at.items() if own & set(sorted(beside)[-layers:])}


def _among(stack: tuple[int, ...], layers: int) -> jax.Array:
    """1 for the last layers of a stack, and 0 for the others."""
    last = (jnp.arange(stack[0]) >= stack[0] - layers).astype(jnp.float32)
    return jnp.broadcast_to(last.reshape(-1, *[1] * (len(stack) - 1)), stack)
