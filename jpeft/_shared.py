"""Arrays that many nodes share: one leaf at `params["jpeft_shared"]`, and a `Ref` to it in every node that uses it.

The leaf is a `Free` where the array trains; gradients of all its uses sum. A shared array is never stacked or copied:
where layers are scanned or experts mapped, it stays outside.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


SHARED = "jpeft_shared"  # not "shared", as T5 calls its embedding


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Ref:
    """Stands for `params["jpeft_shared"][name]`.

    In an `Additive` node of scanned modules it is repeated over their `stack`, for the model's own transform to slice.
    """

    name: str
    stack: tuple[int, ...] = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shared:
    """A shared array in its place, while a computation runs."""

    array: jax.Array


def share(params: Mapping[str, Any], **arrays: Any) -> tuple[dict[str, Any], dict[str, Ref]]:
    """The tree with `arrays` shared, and a `Ref` to each, under a name of its own where one is taken.

    **Raises** `ValueError` for a tree that is no dictionary.
    """
    if not isinstance(params, Mapping):
        raise ValueError(f"Arrays are shared at {SHARED!r} of a dictionary: {type(params).__name__} has no such place.")
    held = params.get(SHARED, {})
    free = lambda name: next(n for n in (name, *(f"{name}_{k}" for k in range(1, len(held) + 1))) if n not in held)
    names = {name: free(name) for name in arrays}
    added = {names[name]: x for name, x in arrays.items()}
    return {**params, SHARED: {**held, **added}}, {name: Ref(names[name]) for name in arrays}


def refs(tree: Any) -> list[str]:
    """The names of the shared arrays that a tree refers to."""
    is_ref = lambda x: isinstance(x, Ref)
    return [x.name for x in jax.tree.leaves(tree, is_leaf=is_ref) if is_ref(x)]


def repeated(tree: Any, stack: tuple[int, ...]) -> Any:
    """The tree whose `Ref`s are repeated over a stack of modules."""
    is_ref = lambda x: isinstance(x, Ref)
    return jax.tree.map(lambda x: Ref(x.name, stack) if is_ref(x) else x, tree, is_leaf=is_ref)


def is_shared(x: Any) -> bool:
    return isinstance(x, Shared)


def unshare(tree: Any) -> Any:
    """The tree with plain arrays in place of its `Shared` ones."""
    return jax.tree.map(lambda x: x.array if is_shared(x) else x, tree, is_leaf=is_shared)


def resolve(params: Any, shared: dict[str, jax.Array]) -> Any:
    """The tree with the array that each `Ref` stands for in its place."""

    def fill(x):
        if not isinstance(x, Ref):
            return x
        array = shared[x.name]
        return jnp.broadcast_to(array, (*x.stack, *array.shape)) if x.stack else Shared(array)

    return jax.tree.map(fill, params, is_leaf=lambda x: isinstance(x, Ref))
