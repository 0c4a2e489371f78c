"""In every construct the nodes at work give what the merged parameters give: outputs, and gradients of the adapters."""

import jax
import jax.numpy as jnp
import pytest
from constructs import LORA, Construct, close, normal
from function_constructs import FUNCTIONS
from linen_constructs import LINEN

import jpeft


CONSTRUCTS = LINEN | FUNCTIONS


def outputs_and_gradients(run, trainable, frozen, reverse):
    """`run(params)`, and the gradients of a random linear function of it with respect to the trainable leaves.

    Where there is no reverse mode, the derivative in one direction instead.
    """

    def loss(trainable):
        y = run(jpeft.combine(trainable, frozen))
        return sum(jnp.vdot(normal(*leaf.shape), leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(y)), y

    if reverse:
        return jax.grad(loss, has_aux=True)(trainable)
    return jax.jvp(loss, (trainable,), (trainable,), has_aux=True)[1:]


def check(construct: Construct, method=LORA, way="branched") -> None:
    """That the nodes at work equal the merged parameters, under `jit` and not, and are used in the given way."""
    params = construct.adapted(method)

    @jax.jit
    def both(*parts):
        got = outputs_and_gradients(construct.apply, *parts, construct.reverse)
        return got, outputs_and_gradients(lambda p: construct.plain(jpeft.merge(p)), *parts, construct.reverse)

    got, want = both(*jpeft.partition(params))
    close(got, want, construct.tolerance)
    close(construct.apply(params), got[1], construct.tolerance)  # not under `jit`
    coverage = jpeft.coverage(construct.run, construct.variables(params), *construct.args)
    assert dict(coverage) == dict.fromkeys(construct.axes, way)


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_branches_equal_merged(name):
    check(CONSTRUCTS[name])


@pytest.mark.parametrize("name", [name for name, construct in CONSTRUCTS.items() if construct.told])
def test_sites_tell_the_letters(name):
    sites = CONSTRUCTS[name].sites()
    assert {path: sites[path].axes for path in CONSTRUCTS[name].axes} == CONSTRUCTS[name].axes
