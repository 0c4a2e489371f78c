"""Layers of a model, by their names: which parameters are of which, numbered or stacked."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._node import Frozen, Leaf, Static, Trainable, rebox, value
from .._targets import no_match


class Rows(Leaf):
    """A stacked parameter of which some `layers` train: their places along `axis` are those of `rows`, in order."""

    base: Frozen[Any]  # the other layers
    rows: Trainable[jax.Array]
    layers: Static[tuple[int, ...]]  # ascending
    axis: Static[int] = 0

    @classmethod
    def of(cls, parameter: Any, layers: Sequence[int], axis: int) -> "Rows":
        """The node, over a parameter that is an array or a box such as `nn.Partitioned`."""
        base, rows = _split(parameter, layers, axis)
        return cls(base=base, rows=rows, layers=tuple(layers), axis=axis)

    @property
    def original(self):
        return self.base

    def rebuild(self, parameter):
        return self.replace(base=_split(parameter, self.layers, self.axis)[0])

    def value(self):
        sources = {False: value(self.base), True: self.rows}
        count, used, parts = sum(x.shape[self.axis] for x in sources.values()), {False: 0, True: 0}, []
        for trains, run in itertools.groupby(range(count), lambda n: n in self.layers):
            end = used[trains] + len(list(run))
            parts.append(jax.lax.slice_in_dim(sources[trains], used[trains], end, axis=self.axis))
            used[trains] = end
        return jnp.concatenate(parts, axis=self.axis)

    def remove_axis(self, index, params):
        raise ValueError(
            "Some rows of a stacked parameter train, and a lifted transform would slice those apart from the others. "
            "Call the model through `jpeft.apply`, or within `jpeft.intercept()`."
        )


def _split(leaf: Any, layers: Sequence[int], axis: int) -> tuple[Any, jax.Array]:
    """The other layers, in the box that `leaf` may be, and `layers`."""
    w = value(leaf)
    others = [n for n in range(w.shape[axis]) if n not in layers]
    base, rows = (jnp.take(w, jnp.array(places, jnp.int32), axis=axis) for places in (others, layers))
    return rebox(leaf, base), rows


# The outermost name that tells of layers: within one there may be numbered blocks again. `output_layer/` tells of none.
LAYERS = (
    r"(?P<stack>(?:.*?/)??(?:"
    r"(?!(?-i:Scan))(?:\w*(?:layer|block)s?|h)[_/]?(?=\d+/)"  # numbered: layers_3/, Block_3/, h/3/
    r"|(?:\w*(?:layers|blocks)|layer|block|h|(?-i:Scan)\w*)(?=/)"  # stacked: layers/, and Flax's own ScanBlock_0/
    r"))(?P<layer>\d+)?/.*"
)


class Place(NamedTuple):
    """Where among layers a parameter is."""

    stack: str  # what all of a stack share of their paths
    count: int  # how many layers the stack has
    layer: int | None  # its number; `None` where the parameter is stacked: it is of all layers


def held(at: Mapping[str, Place]) -> dict[str, set[int]]:
    """The numbers of the layers that every stack has: numbered ones may begin with 1."""
    found: dict[str, set[int]] = {}
    for place in at.values():
        found.setdefault(place.stack, set()).update(range(place.count) if place.layer is None else [place.layer])
    return found


def places(leaves: Mapping[str, Any], pattern: str | None, axis: int) -> dict[str, Place]:
    """The parameters that are in layers, and where. The `pattern` is `LAYERS` by default.

    **Raises** `ValueError` where there are none, for a pattern without the group of what a stack shares, and for
    parameters of one stack that are of different sizes along `axis`.
    """
    compiled = re.compile(pattern or LAYERS, re.IGNORECASE)
    if "stack" not in compiled.groupindex:
        raise ValueError(f"`pattern` is {pattern!r}: it needs a group `(?P<stack>...)` of what all of a stack share.")
    found = {name: match.groupdict() for name in leaves if (match := compiled.fullmatch(name))}
    if not found:
        raise no_match([pattern or r"(.*/)?layers(_\d+)?/.*"], list(leaves), "layer")
    number = {name: int(groups["layer"]) if groups.get("layer") else None for name, groups in found.items()}
    count: dict[str, int] = {}
    for name, groups in found.items():
        stack, n = groups["stack"], number[name]
        size = jax.eval_shape(value, leaves[name]).shape[axis] if n is None else 1 + n
        if n is None and count.setdefault(stack, size) != size:
            raise ValueError(f"{name!r} has {size} places along axis {axis}, others of {stack!r} {count[stack]}.")
        count[stack] = max(count.get(stack, 0), size)
    return {name: Place(x["stack"], count[x["stack"]], number[name]) for name, x in found.items()}
