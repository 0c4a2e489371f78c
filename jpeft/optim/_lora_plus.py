"""LoRA+: another learning rate for the factors next to the outputs."""

import re
from typing import Any

import jax
import optax

from .._node import Node, Role, is_node
from .._targets import name_of
from ._inner import lenient


def lora_plus(
    inner: optax.GradientTransformation,
    *,
    ratio: float = 16.0,
    embedding_ratio: float | None = None,
    vectors: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""LoRA+: the learning rate of every $B$ is `ratio` times that of $A$ and of all else.

    $\Delta B = ratio \cdot u_B$ and $\Delta A = u_A$, where `inner` has the updates $u$. Those of optimizers such as
    AdamW are proportional to the learning rate, decay and all.

    $B$ is what a node declares to have the axes `rank` and `out`, of whichever method.

    Hayou et al., [LoRA+: Efficient Low Rank Adaptation of Large Models](https://arxiv.org/abs/2402.12354), ICML 2024.

    **Arguments:**

    - `inner`: the optimizer, with the learning rate of $A$.
    - `ratio`: the learning rate of $B$ over it.
    - `embedding_ratio`: the learning rate of both factors on parameters named `embedding`, over it. Left out, they are
      as others. Hugging Face's PEFT has $10^{-6}$ for them, divided by the learning rate.
    - `vectors`: whether arrays of one axis, such as biases and the magnitudes of DoRA, have the learning rate of $B$,
      as in PEFT. Biases that train as they are, in `Free`, and are stacked over layers have two axes.

    **Raises** `ValueError` for a ratio that is not positive and, when the state is made, for a tree without a $B$.
    """
    given = {"ratio": ratio, "embedding_ratio": 1.0 if embedding_ratio is None else embedding_ratio}
    if min(given.values()) <= 0:
        raise ValueError(f"Ratios of learning rates are positive, not {given}.")
    inner = lenient(inner)

    def of_array(x: jax.Array, dims: list[str] | None) -> float:
        is_vector = (x.ndim if dims is None else len(dims)) == 1
        is_b = re.fullmatch(r"(.* )?(rank|hybrid) (piece_)?out", " ".join(dims or []))  # GraLoRA's are pieces
        return ratio if is_b or (vectors and is_vector) else 1.0

    def of_node(x: Node) -> Node:
        role = {n: jax.tree.map(lambda a, n=n: of_array(a, x.dims[n]), p) for n, p in x.parts(Role.TRAINABLE).items()}
        return x.replace(**role, **{n: of_tree(p) for n, p in x.parts(Role.FROZEN).items()})

    def of_tree(tree: Any) -> Any:
        return jax.tree.map(lambda x: of_node(x) if is_node(x) else of_array(x, None), tree, is_leaf=is_node)

    def of_parameter(path, x):
        if embedding_ratio is not None and re.fullmatch(r"(.*/)?(input_)?embedding", name_of(path)):
            return jax.tree.map(lambda _: embedding_ratio, x)
        return of_tree(x)

    def ratios_of(tree):
        return jax.tree_util.tree_map_with_path(of_parameter, tree, is_leaf=is_node)

    def init(params):
        if ratio != 1 and all(r == 1 for r in jax.tree.leaves(ratios_of(params))):
            raise ValueError("No array has axes `rank` and `out`, as the B of LoRA: the ratio would change nothing.")
        return inner.init(params)

    def update(updates, state, params=None, **extra):
        updates, state = inner.update(updates, state, params, **extra)
        return jax.tree.map(lambda r, x: r * x, ratios_of(updates), updates), state

    return optax.GradientTransformationExtraArgs(init, update)
