"""How a view of a kernel is laid out: which parts of which kernel axes each of its dimensions consists of.

A kernel's axes are *atoms*; a reshape may split an atom into a major and a minor one. Transposes, reshapes and squeezes
only move atoms about, so an operation that consumes the view can be read back in terms of the kernel's own axes.
An atom of size one is a dimension of its own, or none.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from ._kernel import STACK


UNKNOWN = "?"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Atoms in the order of the kernel's axes, and the view's dimensions as tuples of atoms, major first."""

    letters: str  # of each atom: i, o, s, or ? where nothing is known
    sizes: tuple[int, ...]
    axis: tuple[int, ...]  # the kernel's axis that each atom is part of
    dims: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], letters: str) -> "Layout":
        """The kernel itself."""
        every = tuple(range(len(shape)))
        return cls(letters, tuple(shape), every, tuple((n,) for n in every))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.sizes[t] for t in dim) for dim in self.dims)

    def atoms(self, letter: str) -> tuple[int, ...]:
        """The atoms of a letter that count, in the order in which `fold` keeps them."""
        return tuple(t for t, c in enumerate(self.letters) if c == letter and self._counts(t))

    def of_dims(self, dims) -> tuple[int, ...]:
        """The atoms of some dimensions of the view that count, in their order there."""
        return tuple(t for d in dims for t in self.dims[d] if self._counts(t))

    def _counts(self, t: int) -> bool:
        """Whether an atom is more than a one in a shape, that may come and go."""
        return self.sizes[t] != 1 or self.letters[t] == STACK

    def transpose(self, perm) -> "Layout":
        return dataclasses.replace(self, dims=tuple(self.dims[d] for d in perm))

    def reshape(self, shape: tuple[int, ...]) -> "Layout | None":
        """The layout after a reshape; `None` if it cuts an atom unevenly, or one that is stacked."""
        new, queue, dims = self, [t for dim in self.dims for t in dim], []
        for size in shape:
            dim, left = [], size
            if size == 1 and queue and new.sizes[queue[0]] == 1:
                dim.append(queue.pop(0))
            while left > 1:
                while queue and new.sizes[queue[0]] == 1:
                    queue.pop(0)
                if not queue:
                    return None
                t = queue[0]
                n = new.sizes[t]
                if left % n and (n % left or new.letters[t] == STACK):
                    return None
                if left % n:  # take the major part of the atom, leave the minor
                    new, queue = new._split(t, left), [t, t + 1, *(u + (u > t) for u in queue[1:])]
                    dims, dim = [tuple(u + (u > t) for u in d) for d in dims], [u + (u > t) for u in dim]
                    n = left
                dim.append(queue.pop(0))
                left //= n
            dims.append(tuple(dim))
        return None if any(new.sizes[t] != 1 for t in queue) else dataclasses.replace(new, dims=tuple(dims))

    def _split(self, t: int, major: int) -> "Layout":
        double = lambda xs: (*xs[: t + 1], *xs[t:])
        sizes = (*self.sizes[:t], major, self.sizes[t] // major, *self.sizes[t + 1 :])
        return Layout("".join(double(self.letters)), sizes, double(self.axis), self.dims)

    def drop(self, d: int) -> "Layout":
        """The layout without dimension `d`, which is one whole axis of the kernel."""
        (t,) = self.dims[d]
        k = self.axis[t]
        shift = lambda u: u - (u > t)
        keep = [u for u in range(len(self.sizes)) if u != t]
        return Layout(
            "".join(self.letters[u] for u in keep),
            tuple(self.sizes[u] for u in keep),
            tuple(self.axis[u] - (self.axis[u] > k) for u in keep),
            tuple(tuple(map(shift, dim)) for n, dim in enumerate(self.dims) if n != d),
        )

    def resize(self, d: int, size: int) -> "Layout":
        """The layout with another size of dimension `d`, which is one whole axis of the kernel."""
        (t,) = self.dims[d]
        return dataclasses.replace(self, sizes=(*self.sizes[:t], size, *self.sizes[t + 1 :]))

    def whole_axis(self, d: int) -> int | None:
        """The kernel's axis that dimension `d` is, if it is just one and all of it."""
        if len(self.dims[d]) != 1 or self.axis.count(self.axis[self.dims[d][0]]) != 1:
            return None
        return self.axis[self.dims[d][0]]

    def arrange(self, w: jax.Array) -> jax.Array:
        """The view of the kernel `w`."""
        seen = self.of_dims(range(len(self.dims)))
        lost = [t for t in range(len(self.sizes)) if t not in seen]  # of size one
        w = w.reshape(self.sizes) if w.shape != self.sizes else w
        return jnp.transpose(w, (*seen, *lost)).reshape(self.shape)
