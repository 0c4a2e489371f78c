"""What quantized kernels have in common: a kernel kept as codes, groups of weights, two codes a byte."""

import abc
import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from .._division import entries_of
from .._kernel import IN, OUT, STACK, folded, unfold
from .._mesh import constrained
from .._node import Matrix, Role, Static, whole


class Codes(Matrix):
    """A frozen kernel kept as codes. Its arrays belong to the folded `(in, out)` matrix, with its stacked axes first.

    It has no base: what was rounded away is gone. A weight that is not finite makes every weight that shares a constant
    with it NaN: it does not vanish.
    """

    core: Static[tuple[int, ...]] = ()  # the sizes of the kernel's input and output axes, in its order
    dtype: Static[Any] = None  # of the kernel
    # How its matrix is divided where it is decoded, if not as at rest.
    gathered: Static[NamedSharding | None] = dataclasses.field(default=None, repr=False)

    local = ("gathered",)
    packed = True  # whether weights of a group share bytes

    @abc.abstractmethod
    def decode(self) -> jax.Array:
        """One matrix `(in, out)` in float32; rows may follow that only fill up the last group."""

    def settle(self, w: jax.Array) -> Self:
        return self.replace(core=tuple(n for n, c in zip(w.shape, self.axes, strict=True) if c != STACK), dtype=w.dtype)

    @property
    def groups(self) -> int:
        """How many groups of inputs there are that share constants, of one matrix."""
        name = next(name for name, dims in self.dims.items() if dims and "group" in dims)
        return getattr(self, name).shape[-2]

    def divided(self, division):
        parts, inputs = division.parts(division.inputs), folded(whole(self).shape, self.axes)[-2]
        whole_groups = self.groups % parts == 0 or (self.groups == 1 and not self.packed)
        if inputs % parts or not whole_groups:
            raise ValueError(
                f"its {inputs} inputs are in {self.groups} groups which share constants, and {parts} devices would "
                "cut one. Quantize in smaller groups, or divide the inputs among fewer devices."
            )
        return super().divided(dataclasses.replace(division, data=frozenset()))

    def told(self, division):
        within = division.without_data()
        spec = PartitionSpec(within.inputs or None, within.outputs or None)
        return self.replace(gathered=NamedSharding(division.whole.mesh, spec) if within != division else None)

    def spec(self, of):
        *stack, inputs, outputs = entries_of(of(self.codes), self.depth + 2)
        entries = {STACK: iter(stack), IN: iter([inputs]), OUT: iter([outputs])}
        return PartitionSpec(*(next(entries[c], ()) or None for c in self.axes))

    def _here(self) -> Self:
        """One matrix, its codes and constants divided as its weights are to be: what moves is small then."""
        if self.gathered is None:
            return self
        own = {n: x for n, x in self.parts(Role.FROZEN).items() if x is not None and len(self.dims[n]) == 2}
        return self.replace(**{n: constrained(x, self.gathered) for n, x in own.items()})

    def value(self) -> jax.Array:
        m = self.each(lambda node: node._here().decode().astype(self.dtype))
        stack, core = iter(m.shape[: self.depth]), iter(self.core)
        shape = tuple(next(stack if c == STACK else core) for c in self.axes)
        return unfold(m[..., : folded(shape, self.axes)[-2], :], shape, self.axes)


def grouped(w: jax.Array, size: int) -> jax.Array:
    """Groups of `size` weights of a column: `(in, out)` -> `(groups, size, out)` in float32.

    Where `size` does not divide `in`, the last group is filled up with zeros. Every format's range holds zero, so that
    they change no constant: the weights are rounded as if the last group were shorter.

    **Raises** `ValueError` for a size below one.
    """
    if size < 1:
        raise ValueError(f"A group has at least one weight, not {size}.")
    w = jnp.pad(w.astype(jnp.float32), ((0, -len(w) % size), (0, 0)))
    return w.reshape(-1, size, w.shape[1])


def poison(constants: jax.Array, w: jax.Array) -> jax.Array:
    """The constants `(groups, out)` of the groups `w`, NaN where a weight is not finite: maxima may pass over NaN."""
    return jnp.where(jnp.all(jnp.isfinite(w), axis=1), constants, jnp.nan)


def pack(codes: jax.Array) -> jax.Array:
    """Two codes of 0..15 a byte: `(groups, size, out)` -> `(groups * size / 2, out)` uint8.

    The first half of a group is in the low four bits and the second half in the high ones, so that `unpack` needs no
    interleaving.

    **Raises** `ValueError` for groups of odd size.
    """
    if codes.shape[1] % 2:
        raise ValueError(f"Two codes share a byte: the group's size must be even, not {codes.shape[1]}.")
    low, high = jnp.split(codes.astype(jnp.uint8), 2, axis=1)
    return (low | high << 4).reshape(-1, codes.shape[2])


def unpack(packed: jax.Array, groups: int) -> jax.Array:
    """Undo `pack`: `(groups * size / 2, out)` -> `(groups, size, out)` uint8."""
    shifts = jnp.arange(0, 8, 4, dtype=jnp.uint8).reshape(1, 2, 1, 1)  # a shift fuses where a concatenation may not
    return (packed.reshape(groups, 1, -1, packed.shape[1]) >> shifts & 15).reshape(groups, -1, packed.shape[1])
