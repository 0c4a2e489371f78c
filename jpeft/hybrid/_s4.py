"""S4: groups of layers, each with methods of its own."""

import itertools
from collections.abc import Callable, Sequence

import jax

from .._targets import Sites, named_leaves
from .._tree import Params, chain, transform
from ..additive._bottleneck import bottleneck
from ..additive._prefix import prefix
from ..reparam._lora import lora
from ..selective._layers import places
from ..selective._unfreeze import bitfit
from ._in_layers import in_layers


def spindle(count: int) -> tuple[int, int, int, int]:
    """The sizes of four groups of `count` layers, few at both ends: the outer ones have a sixth, rounded down.

    The inner ones share the others, of which an odd one is the third group's. Six layers are 1, 2, 2, 1; 12 are 2, 4,
    4, 2; 24 are 4, 8, 8, 4; 32 are 5, 11, 11, 5.

    **Raises** `ValueError` for less than four layers.
    """
    if count < 4:
        raise ValueError(f"Four groups of layers are of at least four layers, not of {count}.")
    few = max(1, count // 6)
    many = count - 2 * few
    return few, many // 2, many - many // 2, few


@transform
def s4(
    params: Params,
    *,
    rules: Sequence[Sequence[Callable]] | None = None,
    sizes: Sequence[int] | None = None,
    rank: int = 8,
    width: int = 16,
    length: int = 10,
    pattern: str | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Give every group of layers the methods of its rule.

    Chen et al., [Parameter-Efficient Fine-Tuning Design Spaces](https://arxiv.org/abs/2301.01821), ICLR 2023, found
    four groups with these: an adapter and LoRA; an adapter and a prefix; an adapter, a prefix and biases; a prefix,
    biases and LoRA.

    **Arguments:**

    - `rules`: for every group, from the first layers on, its transforms that wait for a tree. One that several groups
      have, the same object, is applied once, in the layers of all of them.
    - `sizes`: how many layers every group has; by default `spindle` of the layers there are.
    - `rank`, `width`, `length`: of LoRA, of the adapter (`bottleneck`, `"pfeiffer"`) and of the prefix, where `rules`
      is left out.
    - `pattern`: of the parameters in layers, as for `unfreeze`.
    - `sites`: for the methods that take them. Prefixes must have them.
    - `key`: split over the methods; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for sizes that are no numbers above zero, one for each rule, whose sum is that of the
    layers; for stacks of different numbers of layers; and as `in_layers` does.
    """
    if rules is None:
        adapter, term = bottleneck(placement="pfeiffer", width=width), lora(rank=rank)
        front, biases = prefix(length=length), bitfit(create=True)
        rules = ((adapter, term), (adapter, front), (adapter, front, biases), (front, biases, term))
    counts = {place.stack: place.count for place in places(named_leaves(params), pattern, 0).values()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"The stacks have different numbers of layers, {counts}: chain `jpeft.in_layers` for each.")
    count = next(iter(counts.values()))
    sizes = spindle(count) if sizes is None else sizes
    if len(sizes) != len(rules) or min(sizes) < 1 or sum(sizes) != count:
        raise ValueError(f"{len(rules)} rules share {count} layers: `sizes` {tuple(sizes)} cannot be theirs.")
    ends = list(itertools.accumulate(sizes))
    layers: dict[Callable, list[int]] = {}
    for end, size, methods in zip(ends, sizes, rules, strict=True):
        for method in methods:
            layers.setdefault(method, []).extend(range(end - size, end))
    return chain(*(in_layers(method=m, layers=where, pattern=pattern) for m, where in layers.items()))(
        params, sites=sites, key=key
    )
