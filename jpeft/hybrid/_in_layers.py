"""Any method, in some of the layers alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from .._node import Additive
from .._shared import SHARED
from .._targets import Sites, named_leaves
from .._tree import Params, default, modules, takes_sites, transform
from ..selective._layers import held, places


@transform
def in_layers(
    params: Params,
    *,
    method: Callable,
    layers: Sequence[int],
    pattern: str | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    """Apply `method` to a tree that has these layers alone, and put them back among the others.

    Parameters outside of all layers are seen, and stay as they are. Of nodes that the method puts beside modules there,
    those stay that train nothing, as what moves positions up for a prefix.

    **Arguments:**

    - `method`: a transform that waits for its tree, such as `jpeft.lora(rank=8)`.
    - `layers`: numbers from 0, or from the end if negative; where a model has several stacks, these of each.
    - `pattern`: of the parameters in layers, as for `unfreeze`.
    - `sites`: for the method, if it takes them: those of its layers.
    - `key`: for the method; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for layers that are not there, for layers that are stacked, for a method that puts nothing
    in layers, and as the method does.
    """
    at = places(named_leaves(params), pattern, 0)
    if stacks := sorted({place.stack for place in at.values() if place.layer is None}):
        raise ValueError(
            f"The layers under {stacks} are stacked: a parameter of theirs is one for all layers, so that no node "
            "stands in some of them. Build the model with `scan=False`, whose parameters are of layers_0, layers_1, "
            "...; or, to let parameters themselves train, use `jpeft.unfreeze(layers=...)`, which knows stacks."
        )
    counts, there = {place.stack: place.count for place in at.values()}, held(at)
    if outside := [n for n in layers if not all(-k <= n < k and n % k in there[s] for s, k in counts.items())]:
        has = {stack: sorted(found) for stack, found in there.items()}
        raise ValueError(f"Not every stack has the layers {outside}: the stacks have {has}.")
    if not layers:
        raise ValueError("`layers` is empty: the method would act nowhere.")
    chosen = {f"{stack}{n % count}" for stack, count in counts.items() for n in layers}
    others = {f"{place.stack}{place.layer}" for place in at.values()} - chosen
    hidden = lambda path: any(f"{path}/".startswith(f"{root}/") for root in others)

    how = {}
    if sites is not None and takes_sites(method):
        modules = {path: call for path, call in sites.modules.items() if not hidden(path)}
        how = {"sites": Sites({n: site for n, site in sites.items() if not hidden(n)}, modules)}
    seen = _without(params, hidden)
    made = method(seen, key=default(key), **how)
    if _inside(made, chosen) == _inside(seen, chosen):
        raise ValueError(
            "The method acts outside of all layers alone, as a prompt or a side network does: apply it to the whole "
            "tree."
        )
    return _joined(params, made, chosen, "")


def _inside(tree: Params, roots: set[str]) -> list[Any]:
    """The structures of the modules at the paths `roots`."""
    return [jax.tree.structure(x) for path, x in modules(tree).items() if path in roots]


def _without(tree: Params, hidden: Callable[[str], bool], path: str = "") -> Params:
    """The tree without the modules of hidden paths."""
    if not isinstance(tree, Mapping):
        return tree
    return {k: _without(x, hidden, f"{path}{k}/") for k, x in tree.items() if not hidden(path + k)}


def _joined(old: Any, new: Any, chosen: set[str], path: str) -> Any:
    """The chosen layers as they are in the new tree, and all else as in the old one, with nodes that train nothing."""
    if path.rstrip("/") in chosen:
        return new
    if not isinstance(new, Mapping):
        return old
    stays = lambda x: isinstance(x, Additive) and not jax.tree.leaves(x)
    added = {k: x for k, x in new.items() if k == SHARED or stays(x)}
    same = {k: _joined(x, new[k], chosen, f"{path}{k}/") if k in new else x for k, x in old.items()}
    return same | added
