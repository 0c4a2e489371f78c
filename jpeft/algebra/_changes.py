"""What a node makes of its base: a change of the weights, as a matrix or as two factors of it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from .._node import Branch, Reparam, whole, widened
from ..reparam._low_rank import LowRank
from ..reparam._pissa import PiSSA
from ..selective._delta import Dense
from ..selective._sparse import Sparse


Factors = tuple[jax.Array, jax.Array]  # (in, rank) and (rank, out)


def chain(x: Any) -> list[Any]:
    """What stands at a place, from the outermost node to the base."""
    return [x, *chain(x.base)] if isinstance(x, Reparam) else [x]


@functools.singledispatch
def factors(node: Reparam) -> Factors:
    """$L$ and $R$ with $W' = W + L R$.

    **Raises** `TypeError` for a class of nodes that is not known to have them.
    """
    raise TypeError(f"A {type(node).__name__} has no factors.")


@factors.register
def _(node: LowRank) -> Factors:
    return node.left, node.scale * node.right


@factors.register
def _(node: PiSSA) -> Factors:
    left, right = jnp.concatenate([node.a, node.start_a], axis=1), jnp.concatenate([node.b, -node.start_b])
    return left, node.scale * right


def factored(node: Reparam) -> bool:
    """Whether a node, and all that it stands on, have factors."""
    *nodes, _ = chain(node)
    return all(factors.dispatch(type(x)) is not factors.dispatch(object) for x in nodes)


def all_factors(node: Reparam) -> Factors:
    """$L$ and $R$ of a matrix's node and all that it stands on, in float32 at least."""
    *nodes, _ = chain(node)
    dtype = jax.eval_shape(widened, whole(node)).dtype
    left, right = zip(*(x.within(dtype).each(factors) for x in nodes), strict=True)
    return jnp.concatenate(left, axis=1), jnp.concatenate(right)


def change(node: Reparam) -> jax.Array:
    """$W' - W$ `(in, out)` of a matrix's node and all that it stands on, in float32 at least."""
    *nodes, _ = chain(node)
    return functools.reduce(jnp.add, map(_own, nodes))


def _own(node: Reparam) -> jax.Array:
    if isinstance(node, Branch | Dense | Sparse):  # it is the same for W = 0, where nothing is rounded off
        return node.of_base(lambda x, w: x.weight(jnp.zeros_like(w)))
    return node.of_base(lambda x, w: x.weight(w) - w)
