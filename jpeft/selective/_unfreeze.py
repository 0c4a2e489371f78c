"""Selective methods: some of the parameters themselves train."""

import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from .._node import Leaf, Trainable, rebox, value
from .._targets import Sites, Targets, kernels, named_leaves, no_match, select, sibling
from .._tree import Params, put, transform
from ..additive._beft import beft
from ..patterns import BIAS
from ._layers import Rows, held, places


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


def _free(params: Params, names: Iterable[str]) -> Params:
    return put(params, dict.fromkeys(names, lambda x: Free(array=x)))


@transform
def unfreeze(
    params: Params,
    *,
    targets: Targets,
    layers: Sequence[int] | None = None,
    pattern: str | None = None,
    axis: int = 0,
    key: jax.Array | None = None,
) -> Params:
    r"""Let every targeted parameter train, or only those in some layers. See `Free`, and, for stacked layers, `Rows`.

    **Arguments:**

    - `targets`: which parameters, of any shape: patterns, or a predicate `(path, leaf) -> bool`.
    - `layers`: only what is in these layers: numbers from 0, or from the end if negative. Layers are numbered
      (`layers_11/...`) or stacked by `nn.scan` (`layers/...`). Where a model has several stacks of them, an encoder's
      and a decoder's, these of each.
    - `pattern`: of the parameters in layers, with a group `(?P<stack>...)` of what all of a stack share and,
      if they are numbered, `(?P<layer>\d+)`. By default names such as `layers_3/`, `Block_3/`, `h/3/`, or, stacked,
      `layers/` and `ScanBlock_0/`; where such names are within each other, the outermost.
    - `axis`: which axis of stacked parameters the layers are on.
    - `key`: not used.

    **Raises** `ValueError` for targets that match nothing, and for a parameter that a node has taken the place of; with
    `layers` also for those that are not there, and for parameters of one stack of different sizes along `axis`.
    """
    leaves = named_leaves(params)
    if layers is None:
        return _free(params, select(targets, leaves))
    at = places(leaves, pattern, axis)
    found = select(targets, {name: leaves[name] for name in at})
    counts = {at[name].stack: at[name].count for name in found}
    there = held(at)
    if outside := [n for n in layers if not all(-k <= n < k and n % k in there[s] for s, k in counts.items())]:
        has = {stack: sorted(there[stack]) for stack in counts}
        raise ValueError(f"Not every stack with a target has the layers {outside}: the stacks have {has}.")
    chosen = {name: sorted({n % at[name].count for n in layers}) for name in found}
    single = [name for name in found if at[name].layer in chosen[name]]
    rows = {name: chosen[name] for name in found if at[name].layer is None}
    if not single and not any(rows.values()):
        raise ValueError(f"No target is in the layers {list(layers)}: the stacks have {counts}.")
    return put(_free(params, single), {n: functools.partial(Rows.of, layers=x, axis=axis) for n, x in rows.items()})


@transform
def last_layers(
    params: Params,
    *,
    k: int,
    pattern: str | None = None,
    axis: int = 0,
    key: jax.Array | None = None,
) -> Params:
    """Let the last `k` layers train, as a whole: `unfreeze(params, targets=".*", layers=range(-k, 0))`.

    Where a model has several stacks of layers, an encoder's and a decoder's, it is the last `k` of each.

    **Arguments:**

    - `k`: how many layers.
    - `pattern`, `axis`, `key`: as for `unfreeze`.

    **Raises** `ValueError` where there are no layers or fewer than `k`, and as `unfreeze` does.
    """
    return unfreeze(params, targets=".*", layers=range(-k, 0), pattern=pattern, axis=axis)


@transform
def bitfit(
    params: Params,
    *,
    targets: Targets = BIAS,
    create: bool = False,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    """Let the biases train: every parameter named `bias`, those of norms too.

    Ben Zaken et al., [BitFit](https://arxiv.org/abs/2106.10199), ACL 2022. Give its optimizer no weight decay.

    **Arguments:**

    - `targets`: which of them, by the path of the parameter; all by default.
    - `create`: whether every module but the output head that has a kernel and no bias gets one that starts at zero: a
      `BEFT` node. `targets` picks it by the path that it would have; a predicate sees the kernel.
    - `sites`: needed by `create` where modules are stacked by `nn.scan`, or kernels have more than two axes.
    - `key`: not used.

    **Raises** `ValueError` for a model without biases, and otherwise as `unfreeze` and `beft` do.
    """
    leaves, without = named_leaves(params), {}
    if create:
        owned = {sibling(name, "bias"): name for name in kernels(params, None, sites)}
        without = {bias: leaves[kernel] for bias, kernel in owned.items() if bias not in leaves}
    names = leaves | without
    if not callable(targets) and not any(re.fullmatch(BIAS, name) for name in names):
        raise ValueError(
            "This model has no parameter named `bias`: BitFit would train nothing. With `create=True` its modules get "
            "some, `jpeft.norms` trains the norms' scales, `jpeft.unfreeze` what its `targets` name. There are: "
            f"{', '.join(list(leaves)[:8])}, ..."
        )
    found = select(targets, names)
    modules = {name.rpartition("/")[0] for name in found if name in without}
    if modules:
        params = beft(params, targets=lambda path, _: path in modules, sites=sites)
    return _free(params, (name for name in found if name in leaves))


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
