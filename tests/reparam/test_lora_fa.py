"""LoRA-FA: B trains as in LoRA, A has no gradient, and inputs are not kept for one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

import jpeft


TOKENS, WIDTH, RANK = 7, 5, 2


X = normal(0, TOKENS, WIDTH)


def model(params, x):
    return x @ params["first"] @ params["second"]


def tuned(**options):
    """Two layers with random B."""
    weights = {"first": normal(1, WIDTH, WIDTH), "second": normal(2, WIDTH, WIDTH)}
    params = jpeft.lora(weights, rank=RANK, alpha=6, targets=".*", **options)
    return {name: node.replace(b=normal(3, *node.b.shape)) for name, node in params.items()}


def run(trainable, frozen):
    return jpeft.apply(model, jpeft.combine(trainable, frozen), X)


def gradients(**options):
    return jax.grad(lambda trainable, frozen: jnp.sum(run(trainable, frozen) ** 2))(*jpeft.partition(tuned(**options)))


def test_b_trains_as_in_lora():
    found, want = gradients(freeze_a=True), gradients()
    for name, node in found.items():
        assert node.a is None and np.all(want[name].a != 0)
        np.testing.assert_allclose(node.b, want[name].b, rtol=1e-4, atol=1e-4)


def kept(**options):
    """The shapes of what is kept of the forward pass."""
    trainable, frozen = jpeft.partition(tuned(**options))
    _, back = jax.vjp(lambda t: run(t, frozen), trainable)
    return [x.shape for x in jax.tree.leaves(back)]


def test_of_inputs_no_more_is_kept_than_x_a():
    assert kept().count((TOKENS, WIDTH)) == 2
    shapes = kept(freeze_a=True)
    assert (TOKENS, WIDTH) not in shapes and shapes.count((TOKENS, RANK)) == 2


def products(**options):
    """How many products the gradient takes."""
    trainable, frozen = jpeft.partition(tuned(**options))
    jaxpr = jax.make_jaxpr(jax.grad(lambda t: jnp.sum(run(t, frozen) ** 2)))(trainable)
    return str(jaxpr).count("dot_general[")


def test_no_gradient_of_a_is_computed():
    """One product less for every A, and another one at the first: no gradient is needed before its B."""
    assert products() - products(freeze_a=True) == 3


def test_refuses_an_a_of_zeros():
    with pytest.raises(ValueError, match="with `freeze_a=True` the term would stay zero"):
        jpeft.lora({"w": normal(1, 9, 4)}, init="embedding", freeze_a=True, targets="w")
