"""Nodes without what serves their training alone."""

from collections.abc import Mapping

import jax

from ._node import Additive, Node, Reparam
from ._shared import SHARED, refs, resolve, unshare
from ._tree import Params, map_nodes, shared_arrays


def collapse(params: Params, *, task: int | None = None) -> Params:
    """The tree with simpler nodes, that compute the same in calls without a key.

    A prompt becomes a `Prompt`, without its network or factors; a mixture that is one for all inputs, as `AdaMix`, the
    adapter that it comes to; what has tasks, as `Poly`, what one of them has.

    **Arguments:**

    - `task`: whose. It can be left out where there is one alone.
    """
    made = _collapsed(params, task, shared_arrays(params))
    unused = set(refs(params)) - set(refs(made))
    if not unused:
        return made
    kept = {name: x for name, x in made[SHARED].items() if name not in unused}
    return {name: x for name, x in made.items() if name != SHARED} | ({SHARED: kept} if kept else {})


def _collapsed(params: Params, task: int | None, shared: dict[str, jax.Array]) -> Params:
    if isinstance(params, Additive):
        whole = unshare(resolve(params, shared))  # a simpler one has the arrays as its own
        made = whole.at_rest(task)
        return params if made is whole else made
    if not isinstance(params, Mapping):
        return map_nodes(lambda x: x.at_rest(task), params, Node)
    own, over = {}, []
    for name, x in params.items():
        made = _collapsed(x, task, shared)
        if isinstance(x, Additive) and isinstance(made, Reparam):
            over.append(made)  # it stood beside the kernel
        elif made is not None or x is None:
            own[name] = made
    for node in over:
        (kernel,) = (name for name, x in own.items() if name != "bias" and not isinstance(x, Additive))
        own[kernel] = node.replace(base=own[kernel])
    return own
