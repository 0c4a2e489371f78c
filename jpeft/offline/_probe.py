"""A node that measures what its kernel is multiplied with."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from .._node import Branch, Frozen, Static, Trainable
from .._operands import NoRule, Operand, Routed


class Probe(Branch):
    """Changes nothing. The gradient of its `moment` is `[x, 1]^T [x Omega, 1, |x|^2]`, summed over rows."""

    # complex, as the numbers of a node that are real are cast to the dtype of its product
    moment: Trainable[jax.Array, "in+1 sketch+2"]
    left: Frozen[jax.Array, "in 1"]  # zeros
    right: Frozen[jax.Array, "1 out"]  # zeros
    mask: Frozen[Any] = None  # shared
    path: Static[str]

    def weight(self, w):
        return w

    def branch(self, x, key):
        if isinstance(x, Operand) and not isinstance(x, Routed):
            raise NoRule("Only rows can be summed.")
        moment = jax.lax.stop_gradient(self.measured(x))
        tap = lambda y: _tapped(y, self.moment, moment)
        y = x @ self.left
        return (y.map(tap) if isinstance(y, Operand) else tap(y)) @ self.right

    def measured(self, x: Any) -> jax.Array:
        """What the gradient of `moment` is to be: for one matrix, or where `x` is routed, for all experts."""
        routed = isinstance(x, Routed)
        times = (lambda rows, m: jax.lax.ragged_dot(rows, m, x.groups)) if routed else jnp.matmul
        rows = (x.x if routed else x).astype(jnp.float32)
        ones = jnp.ones((*rows.shape[:-1], 1))
        signs = omega(rows.shape[-1], self.moment.shape[-1] - 2)
        with jax.default_matmul_precision("float32"):
            seen = rows if signs is None else rows @ signs
            right = jnp.concatenate([seen, ones, jnp.sum(jnp.square(rows), -1, keepdims=True)], -1)
            product = functools.partial(times, jnp.concatenate([rows, ones], -1))
            transposed = jax.linear_transpose(product, jax.ShapeDtypeStruct(self.moment.shape, jnp.float32))
            (moment,) = transposed(right * self.weights(rows.shape[:-1], routed))
        return moment

    def weights(self, shape: tuple[int, ...], routed: bool) -> jax.Array:
        """What each row counts, `(..., 1)`."""
        if self.mask is None:
            return jnp.ones((*shape, 1))
        sizes = lambda shape: [n for n in shape if n != 1]
        same = math.prod(shape) == self.mask.size and (len(shape) == 1 or self.mask.ndim == 1)
        if routed or not (same or sizes(shape) == sizes(self.mask.shape)):
            why = "are sorted by expert" if routed else f"are {shape}"
            raise ValueError(
                f"The mask is {self.mask.shape}, but the rows that enter {self.path!r} {why}: leave it out of "
                "`targets`, or take batches without padding."
            )
        return self.mask.reshape(*shape, 1).astype(jnp.float32)


@jax.custom_vjp
def _tapped(y: jax.Array, moment: jax.Array, found: jax.Array) -> jax.Array:
    """`y`, such that the gradient of `moment` is `found`, whatever is done with `y`."""
    return y


def _tapped_forward(y, moment, found):
    return y, found


def _tapped_backward(found, g):
    return g, found.astype(jnp.complex64), jnp.zeros_like(found)


_tapped.defvjp(_tapped_forward, _tapped_backward)


def new_probe(key, w, *, sketch, path):
    d_in, d_out = w.shape
    moment = jnp.zeros((d_in + 1, min(sketch or d_in, d_in) + 2), jnp.complex64)
    return Probe(moment=moment, left=jnp.zeros((d_in, 1)), right=jnp.zeros((1, d_out)), path=path)


def omega(size: int, sketch: int) -> jax.Array | None:
    """Random signs `(in, sketch)`, the same in every call; `None` for the identity."""
    return None if sketch == size else jax.random.rademacher(jax.random.key(0), (size, sketch), jnp.float32)
