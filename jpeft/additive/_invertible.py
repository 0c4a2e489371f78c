"""Invertible adapters: at the embeddings, and inverted before the output head."""

import re
from typing import Literal

import jax
import jax.numpy as jnp

from .._node import Static, Trainable, whole
from .._shared import share
from .._targets import Targets, named_leaves, one_of, select
from .._tree import Params, default, modules, nodes_of, place, transform
from ..places import EMBEDDINGS, FINAL_NORM
from ..selective._unfreeze import Free
from ._bottleneck import STARTS, activation_of, affine, arrays
from ._hidden import Hidden


class Invertible(Hidden):
    r"""$y_1 = x_1 + F(x_2)$ and $y_2 = x_2 + G(y_1)$ for the halves of the features; or its inverse. See `Hidden`.

    $F$ and $G$ are bottlenecks, $\phi(x D + d)\,U + u$, which the node at the embeddings and its inverse share. No
    volume changes: the determinant of the Jacobian is 1.

    Dinh et al., [NICE](https://arxiv.org/abs/1410.8516), 2014, as adapters in Pfeiffer et al.,
    [MAD-X](https://arxiv.org/abs/2005.00052), EMNLP 2020.
    """

    f: Trainable[dict[str, jax.Array]]  # of the second half, for the first: `down`, `down_bias`, `up` and `up_bias`
    g: Trainable[dict[str, jax.Array]]  # of the first half, for the second
    activation: Static[str] = "relu"
    inverse: Static[bool] = False

    def change(self, h, key):
        first, second = jnp.split(h, [h.shape[-1] // 2], axis=-1)
        if self.inverse:
            change = -self._bent(self.g, first)
            return jnp.concatenate([-self._bent(self.f, second + change), change], axis=-1)
        change = self._bent(self.f, second)
        return jnp.concatenate([change, self._bent(self.g, first + change)], axis=-1)

    def _bent(self, own: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        x = activation_of(self.activation)(affine(x, own["down"], own["down_bias"]))
        return affine(x, own["up"], own["up_bias"])


# What embeddings come to: of one table; or the module that adds up several, as BERT's does.
TABLE = "(input_)?embedding"
EMBEDDED = rf"(.*/)?embeddings|(?!(.*/)?embeddings/){EMBEDDINGS}"


@transform
def invertible(
    params: Params,
    *,
    reduction: float = 2,
    activation: str = "relu",
    init: Literal["zero", "houlsby", "adapter_plus", "bert"] = "zero",
    targets: Targets = EMBEDDED,
    inverse: Targets | None = FINAL_NORM,
    key: jax.Array | None = None,
) -> Params:
    r"""Put an invertible adapter behind the embeddings, and its inverse before the output head. See `Invertible`.

    Their arrays are shared, at `params["jpeft_shared"]`.

    **Arguments:**

    - `reduction`: how many times narrower the bottlenecks are than the half of the features that goes in.
    - `activation`, `init`: of the bottlenecks, as for `bottleneck`. With `"zero"` the model starts as it was.
    - `targets`: the module that returns the embeddings, found by its usual names.
    - `inverse`: modules of whose output the head, tied to the embeddings or not, makes logits: by default the norm
      after the last layer, found by its usual names. `None` for none, in a model without logits of its tokens.
    - `key`: for the initialisation; `jax.random.key(0)` if left out.

    **Raises** `ValueError` where there is not one such module of embeddings, with a table of its own or below it, for
    a bottleneck without features, a second one in a tree, for an unknown init or activation, and for an `inverse` that
    matches no module.
    """
    if nodes_of(params, Invertible):
        raise ValueError("This tree has an invertible adapter: the inverses of two would act in the wrong order.")
    one_of("init", init, STARTS)
    activation_of(activation)
    known = modules(params)
    found = list(select(targets, known, "module"))
    if len(found) != 1:
        raise ValueError(f"Which module returns the embeddings? `targets` matches {found}.")
    table = rf"{re.escape(found[0])}/(.*/)?{TABLE}"
    tables = (whole(x).shape for name, x in named_leaves(params).items() if re.fullmatch(table, name))
    features = next(tables, (0,))[-1]
    first, second = features // 2, features - features // 2
    if int(first // reduction) < 1:
        raise ValueError(f"{found[0]!r} has {features} features: none are left in half of them / {reduction}.")
    key_f, key_g = jax.random.split(default(key))
    starts = {
        "f": arrays(key_f, init, second, int(second // reduction), first),
        "g": arrays(key_g, init, first, int(first // reduction), second),
    }
    free = {f"invertible_{half}_{name}": Free(array=x) for half, own in starts.items() for name, x in own.items()}
    params, refs = share(params, **free)
    fields = {half: {name: refs[f"invertible_{half}_{name}"] for name in own} for half, own in starts.items()}
    node = Invertible(**fields, activation=activation)
    params = place(params, {found[0]: node}, "invertible")
    if inverse is None:
        return params
    return place(params, dict.fromkeys(select(inverse, known, "module"), node.replace(inverse=True)), "invertible")
