"""Selective methods: some of the parameters themselves train."""

import functools
import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from .._node import Frozen, Leaf, Static, Trainable, rebox, value
from .._targets import Targets, named_leaves, no_match, select
from .._tree import Params, put, transform


class Free(Leaf):
    """A parameter that trains: $W' = W$."""

    array: Trainable[Any]  # the parameter as it stood there: an array, or a box such as `nn.Partitioned`

    @property
    def original(self):
        return self.array

    def rebuild(self, parameter):
        return self.replace(array=rebox(parameter, self.array))

    def value(self):
        return value(self.array)


class Rows(Leaf):
    """A stacked parameter of which the last layers train: $W' = [W_{:L-k}; R]$, joined along the stacked `axis`."""

    base: Frozen[Any]  # the layers that do not train
    rows: Trainable[jax.Array]  # the k that do
    axis: Static[int] = 0

    @property
    def original(self):
        return self.base

    def rebuild(self, parameter):
        return self.replace(base=_cut(parameter, self.rows.shape[self.axis], self.axis)[0])

    def value(self):
        return jnp.concatenate([value(self.base), self.rows], axis=self.axis)

    def remove_axis(self, index, params):
        raise ValueError(
            "Some rows of a stacked parameter train, and a lifted transform would slice those apart from the others. "
            "Call the model through `jpeft.apply`, or within `jpeft.intercept()`."
        )


def _cut(leaf: Any, k: int, axis: int) -> tuple[Any, jax.Array]:
    """All but the last `k` places along `axis`, in the box that `leaf` may be, and those."""
    head, rows = jnp.split(value(leaf), [value(leaf).shape[axis] - k], axis=axis)
    return rebox(leaf, head), rows


def _free(params: Params, names: Iterable[str]) -> Params:
    return put(params, dict.fromkeys(names, lambda x: Free(array=x)))


@transform
def unfreeze(params: Params, *, targets: Targets, key: jax.Array | None = None) -> Params:
    """Let every targeted parameter train. See `Free`.

    **Arguments:**

    - `targets`: which parameters, of any shape: patterns, or a predicate `(path, leaf) -> bool`.
    - `key`: not used.

    **Raises** `ValueError` for a pattern that matches nothing, and for a parameter that a node has taken the place of.
    """
    return _free(params, select(targets, named_leaves(params)))


@transform
def bitfit(params: Params, *, targets: Targets = r"(.*/)?bias", key: jax.Array | None = None) -> Params:
    """Let the biases train: every parameter named `bias`, those of norms too.

    Ben Zaken et al., [BitFit](https://arxiv.org/abs/2106.10199), ACL 2022. Give its optimizer no weight decay.

    **Raises** `ValueError` for a model without biases, and otherwise as `unfreeze` does.
    """
    leaves = named_leaves(params)
    if not callable(targets) and not any(re.fullmatch(r"(.*/)?bias", name) for name in leaves):
        raise ValueError(
            "This model has no parameter named `bias`: BitFit would train nothing. `jpeft.norms` trains the norms' "
            f"scales, `jpeft.unfreeze` what its `targets` name. There are: {', '.join(list(leaves)[:8])}, ..."
        )
    return _free(params, select(targets, leaves))


@transform
def norms(params: Params, *, targets: Targets = ".*", key: jax.Array | None = None) -> Params:
    """Let the norms train: every vector named `scale`, and the `bias` beside one.

    Zhao et al., [Tuning LayerNorm in Attention](https://arxiv.org/abs/2312.11420), ICLR 2024. The scales train as they
    are stored, also where a model adds one to them. It needs a learning rate well above that of full fine-tuning.

    **Arguments:**

    - `targets`: which of them, by the path of the parameter; all by default.

    **Raises** `ValueError` where there is none, and otherwise as `unfreeze` does.
    """
    leaves = named_leaves(params)
    owners = {name.rpartition("/")[0] for name in leaves if name.rpartition("/")[2] == "scale"}
    own = {n: n.rpartition("/") for n in leaves}
    found = {n: x for n, x in leaves.items() if own[n][0] in owners and own[n][2] in ("scale", "bias")}
    if not found:
        raise no_match([r"(.*/)?scale"], list(leaves), "norm")
    return _free(params, select(targets, found))


# The outermost name that tells of layers: within one there may be numbered blocks again. `output_layer/` tells of none.
LAYERS = (
    r"(?P<stack>(?:.*?/)??(?:"
    r"(?!(?-i:Scan))(?:\w*(?:layer|block)s?|h)[_/]?(?=\d+/)"  # numbered: layers_3/, Block_3/, h/3/
    r"|(?:\w*(?:layers|blocks)|layer|block|h|(?-i:Scan)\w*)(?=/)"  # stacked: layers/, and Flax's own ScanBlock_0/
    r"))(?P<layer>\d+)?/.*"
)


@transform
def last_layers(
    params: Params,
    *,
    k: int,
    layers: str | None = None,
    axis: int = 0,
    key: jax.Array | None = None,
) -> Params:
    r"""Let the last `k` layers train, numbered (`layers_11/...`) or stacked by `nn.scan` (`layers/...`). See `Rows`.

    Where a model has several stacks of layers, an encoder's and a decoder's, it is the last `k` of each.

    **Arguments:**

    - `k`: how many layers.
    - `layers`: a pattern of the parameters in layers, with a group `(?P<stack>...)` of what all of a stack share and,
      if they are numbered, `(?P<layer>\d+)`. By default names such as `layers_3/`, `Block_3/`, `h/3/`, or, stacked,
      `layers/` and `ScanBlock_0/`; where such names are within each other, the outermost.
    - `axis`: which axis of stacked parameters the layers are on.
    - `key`: not used.

    **Raises** `ValueError` where there are no layers or fewer than `k`, where parameters of one stack are of different
    sizes along `axis`, and for a parameter that a node has taken the place of.
    """
    leaves = named_leaves(params)
    pattern = re.compile(layers or LAYERS, re.IGNORECASE)
    if "stack" not in pattern.groupindex:
        raise ValueError(f"`layers` is {layers!r}: it needs a group `(?P<stack>...)` of what all of a stack share.")
    found = {n: m.groupdict() for n in leaves if (m := pattern.fullmatch(n))}
    if not found:
        raise no_match([layers or r"(.*/)?layers(_\d+)?/.*"], list(leaves), "layer")
    place = {n: int(m["layer"]) if m.get("layer") else None for n, m in found.items()}
    count: dict[str, int] = {}
    for n, m in found.items():
        size = jax.eval_shape(value, leaves[n]).shape[axis] if place[n] is None else 1 + place[n]
        if place[n] is None and count.setdefault(m["stack"], size) != size:
            others = f"others of {m['stack']!r} {count[m['stack']]}"
            raise ValueError(f"{n!r} has {size} places along axis {axis}, {others}.")
        count[m["stack"]] = max(count.get(m["stack"], 0), size)
    if not 1 <= k <= min(count.values()):
        raise ValueError(f"`k` is {k}, but the stacks of layers have {count}.")
    first = {n: count[m["stack"]] - k for n, m in found.items()}

    chosen = [n for n in found if place[n] is None or place[n] >= first[n]]

    def one(name, x):
        if place[name] is not None:
            return Free(array=x)
        base, rows = _cut(x, k, axis)
        return Rows(base=base, rows=rows, axis=axis)

    return put(params, {name: functools.partial(one, name) for name in chosen})
