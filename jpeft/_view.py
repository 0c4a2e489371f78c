"""A parameter on its way through a computation: the node that it is, and how it has been viewed since."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ._layout import UNKNOWN, Layout
from ._mesh import automatic
from ._node import Leaf, Matrix, Reparam, take, value, whole
from ._shared import unshare


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """A parameter after transposes, reshapes, casts and products with scalars."""

    node: Any  # an array, or a `Leaf`
    gain: jax.Array | None  # the product of the scalars
    name: str = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True})
    casts: tuple[Any, ...] = dataclasses.field(metadata={"static": True})
    constraint: Any = dataclasses.field(metadata={"static": True})  # a sharding that the model asks for
    origin: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # of each axis, in the parameter itself

    @classmethod
    def of(cls, name: str, node: Any) -> "View":
        aval = whole(node)
        letters = node.axes if isinstance(node, Matrix) else UNKNOWN * len(aval.shape)
        return cls(node, None, name, Layout.of(aval.shape, letters), (aval.dtype,), None, tuple(range(aval.ndim)))

    def replace(self, **changes: Any) -> "View":
        return dataclasses.replace(self, **changes)

    @property
    def dtype(self) -> Any:
        return self.casts[-1]

    @property
    def base(self) -> "View":
        """The view of the node's base."""
        base = self.node.base
        return self.replace(node=base if isinstance(base, Leaf) else value(base))

    @property
    def adapter(self) -> Reparam:
        """The node without its base, in the dtype of the computation."""
        return self.node.within(self.dtype)

    def branch(self, x: Any, key: jax.Array | None) -> Any:
        """What the node adds to a product with the operand `x`."""
        return unshare(self.adapter).branch(x, key)

    def value(self) -> jax.Array:
        """The array that the view is of."""
        w = self.layout.arrange(automatic(value, self.node, like=whole(self.node)))
        for dtype in self.casts[1:]:
            w = w.astype(dtype)
        w = w if self.gain is None else w * self.gain.astype(w.dtype)
        return w if self.constraint is None else jax.lax.with_sharding_constraint(w, self.constraint)

    def scaled(self, y: jax.Array) -> jax.Array:
        """`y`, which is linear in the parameter, times the scalars."""
        return y if self.gain is None else y * self.gain.astype(y.dtype)

    def relayout(self, layout: Layout | None) -> "View | None":
        return None if layout is None else self.replace(layout=layout, constraint=None)

    def astype(self, dtype: Any) -> "View | None":
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        return self.replace(casts=(*self.casts, dtype)) if dtype != self.dtype else self

    def times(self, scalar: jax.Array) -> "View":
        return self.replace(gain=scalar if self.gain is None else self.gain * scalar)

    def part(self, fn: Any, d: int, size: int | None) -> "View | None":
        """The view whose dimension `d` is what `fn(array, axis)` leaves of it: `size` places, or no dimension at all.

        `None` where the node has no part along that dimension.
        """
        axis = self.layout.whole_axis(d)
        node = None if axis is None else take(self.node, fn, axis, size is None)
        if node is None:
            return None
        if size is not None:
            return self.replace(node=node, layout=self.layout.resize(d, size), constraint=None)
        origin = (*self.origin[:axis], *self.origin[axis + 1 :])
        return self.replace(node=node, layout=self.layout.drop(d), constraint=None, origin=origin)
