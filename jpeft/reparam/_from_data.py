"""What starts of data have in common: a node for every kernel that was measured, made of what was measured there."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from .._kernel import STACK, fold, folded, stacked
from .._node import value, whole
from .._shared import resolve
from .._targets import Option, name_of, named_leaves, options
from .._tree import Params, put, shared_arrays
from ..offline._inputs import Inputs


def of_inputs(inputs: Params, params: Params) -> dict[str, Inputs]:
    """Every `Inputs` in what `capture_inputs` returned, by the name of its kernel.

    **Raises** `ValueError` if there are none, and with every path that `params` lacks or has with another size.
    """
    is_inputs = lambda x: isinstance(x, Inputs)
    leaves = jax.tree_util.tree_leaves_with_path(inputs, is_leaf=is_inputs)
    found = {name_of(path): x for path, x in leaves if is_inputs(x)}
    if not found:
        raise ValueError("`inputs` holds none: give what `jpeft.capture_inputs(forward, params, batches)` returns.")
    have, seen = named_leaves(params), {name: x.product.shape[:-1] for name, x in found.items()}
    fits = lambda name: name in have and folded(whole(have[name]).shape, found[name].axes)[:-1] == seen[name]
    bad = [f"{name}: {shape}" for name, shape in seen.items() if not fits(name)]
    if bad:
        raise ValueError(f"This tree has no kernels with these (stack, inputs): {'; '.join(bad)}. Capture its own.")
    return found


def wrap_with(
    params: Params, new: Callable, data: Mapping[str, Any], axes: Mapping[str, str], **given: Option
) -> Params:
    """Put the node that `new(data, w, **options)` returns over every kernel that `data` names. See `wrap`.

    `w` is one `(in, out)` matrix of the kernel, in its own dtype, and `data` what belongs to it: all arrays of
    `data[name]` have the stacked axes of the kernel first.

    **Arguments:**

    - `axes`: the letters of the axes of every kernel that options are for, by name.
    - `given`: options of `new`, each one value or a mapping from patterns to values.

    **Raises** `ValueError` for patterns that match nothing, and whatever `new` does.
    """
    shared, chosen = shared_arrays(params), options(given, list(axes))

    def one(name, leaf):
        w = fold(value(resolve(leaf, shared)), axes[name])
        node = stacked(lambda data, w: new(data, w, **chosen[name]), axes[name].count(STACK))(data[name], w)
        return node.replace(base=leaf, axes=axes[name])

    return put(params, {name: lambda leaf, name=name: one(name, leaf) for name in data}, over_nodes=True)
