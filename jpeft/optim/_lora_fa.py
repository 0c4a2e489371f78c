"""LoRA-FA: of the gradient of B what is nearest to full fine-tuning, where A is frozen."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._node import widened
from .._tree import combine, nodes_of
from ..reparam._lora import LoRA
from ._inner import lenient


def lora_fa(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    r"""LoRA-FA's preconditioner: `inner` gets $\frac{1}{s^2} (A^T A)^{-1} g_B$ in place of $g_B$, and $A$ stays.

    With $g_B = s A^T G$ for the gradient $G$ of the kernel, a step of gradient descent changes $W'$ by
    $-\eta\,A (A^T A)^{-1} A^T G$: of all changes that $A$ allows it is the nearest to $-\eta\,G$, whatever $s$ is.

    It needs $A$, so `update` takes what does not train as `frozen`, for `jpeft.lora(params, freeze_a=True)`:

        updates, opt_state = tx.update(grads, opt_state, trainable, frozen=frozen)

    Where $A$ is in the trainable tree it is found there, and its updates become zero. What is of no `LoRA` node trains
    as `inner` has it.

    Zhang et al., [LoRA-FA](https://arxiv.org/abs/2308.03303), 2023, in the form of Hugging Face's PEFT.

    **Raises** `ValueError`, in `update`, for trees without a `LoRA` node or without the $A$ of one.
    """
    inner = lenient(inner)

    def update(updates, state, params=None, *, frozen=None, **extra):
        nodes = params if frozen is None else combine(params, frozen)
        if any(x.a is None for x in nodes_of(nodes, LoRA, "lora").values()):
            raise ValueError("A is frozen: hand it over, `tx.update(grads, opt_state, trainable, frozen=frozen)`.")
        updates, state = inner.update(_at_b(_preconditioned, nodes, updates), state, params, **extra)
        return _at_b(lambda node, x: x, nodes, updates), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _is_lora(x: Any) -> bool:
    return isinstance(x, LoRA)


def _at_b(fn: Callable[[LoRA, jax.Array], jax.Array], nodes: Any, updates: Any) -> Any:
    """The updates with `fn(node, x)` in place of the `x` of every B, and zero for every A."""

    def one(node, x):
        if not _is_lora(node):
            return x
        zero = None if x.a is None else jnp.zeros_like(x.a)
        return x.replace(base=_at_b(fn, node.base, x.base), a=zero, b=fn(node, x.b))

    return jax.tree.map(one, nodes, updates, is_leaf=_is_lora)


def _preconditioned(node: LoRA, gradient: jax.Array) -> jax.Array:
    a = widened(node.a)
    inverse = jnp.linalg.pinv(jnp.swapaxes(a, -1, -2) @ a, hermitian=True)  # singular where in < rank
    return (inverse @ gradient.astype(a.dtype) / node.scale**2).astype(gradient.dtype)
