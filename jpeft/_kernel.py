"""Kernels as matrices: fold a kernel of any shape to `(stack..., in, out)`, and back.

`axes` names each axis of a kernel with one letter: `i`nput, `o`utput, or `s`tacked (the layers of an `nn.scan`,
experts). `"io"` is `nn.Dense`, `"ioo"` a query projection `(features, heads, head_dim)`, `"sio"` a scanned `nn.Dense`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp


STACK, IN, OUT = "s", "i", "o"


def order(axes: str) -> list[int]:
    """The axes of a kernel in the order of its folded form: stacked, input, output."""
    return [n for letter in (STACK, IN, OUT) for n, c in enumerate(axes) if c == letter]


def folded(shape: tuple[int, ...], axes: str) -> tuple[int, ...]:
    """The shape `(stack..., in, out)` of a folded kernel."""
    size = lambda letter: math.prod(n for n, c in zip(shape, axes, strict=True) if c == letter)
    return (*(n for n, c in zip(shape, axes, strict=True) if c == STACK), size(IN), size(OUT))


def fold(w: jax.Array, axes: str) -> jax.Array:
    """The kernel `w` as matrices `(stack..., in, out)`."""
    return jnp.transpose(w, order(axes)).reshape(folded(w.shape, axes))


def unfold(m: jax.Array, shape: tuple[int, ...], axes: str) -> jax.Array:
    """Undo `fold`: the matrices `m` as a kernel of `shape`."""
    perm = order(axes)
    return jnp.transpose(m.reshape([shape[n] for n in perm]), [perm.index(n) for n in range(len(perm))])


def stacked(fn: Callable, depth: int, in_axes=0) -> Callable:
    """`fn`, mapped over `depth` leading axes. `in_axes` is for all of them, or a list of one each, outermost first."""
    for axes in reversed(in_axes if isinstance(in_axes, list) else [in_axes] * depth):
        fn = jax.vmap(fn, in_axes=axes)
    return fn
