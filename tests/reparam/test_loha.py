"""What is known of LoHa in closed form: its formula, its rank, its start, and LoRA as a special case."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

import jpeft


W = jax.random.normal(jax.random.key(0), (10, 9))


def tuned(**changes):
    node = jpeft.loha({"w": W}, rank=2, alpha=6, targets="w")["w"]
    parts = {"a1": normal(1, 10, 2), "b1": normal(2, 2, 9), "a2": normal(3, 10, 2), "b2": normal(4, 2, 9)}
    return node.replace(**{**parts, **changes})


def test_formula_and_rank():
    node = tuned()
    change = 3 * (node.a1 @ node.b1) * (node.a2 @ node.b2)
    np.testing.assert_allclose(node.value() - W, change, rtol=1e-4, atol=1e-4)
    assert jnp.linalg.matrix_rank(change) == 4


def test_lora_where_one_product_is_of_ones():
    node = tuned(a2=jnp.full((10, 2), 0.5), b2=jnp.ones((2, 9)))
    lora = jpeft.LoRA(base=W, a=node.a1, b=node.b1, scale=node.scale)
    np.testing.assert_allclose(node.value(), lora.value(), rtol=1e-5, atol=1e-5)


def test_start():
    """W' = W, and only the factor that is zero has a gradient."""
    node = jpeft.loha({"w": W}, targets="w")["w"]
    np.testing.assert_array_equal(node.value(), W)
    gradient = jax.grad(lambda node: jnp.sum(jnp.sin(node.value())))(node)
    assert np.all(gradient.a2 != 0)
    assert all(np.all(getattr(gradient, name) == 0) for name in ("a1", "b1", "b2"))
    assert np.abs(node.a1).max() <= 10**-0.5 and np.abs(node.b1).max() <= 8**-0.5


def test_of_a_window():
    """The factors of channels and the cores of the window, as proposition 3 of the paper has them."""
    model, x = nn.Conv(5, (3, 2)), normal(5, 1, 6, 6, 4)
    params = model.init(jax.random.key(0), x)["params"]
    sites = jpeft.sites(model, {"params": params}, x)
    node = jpeft.loha(params, rank=2, effective_conv=True, sites=sites, targets="kernel")["kernel"]
    assert node.a1.shape == (4, 2) and node.t1.shape == (6, 2, 2)
    node = node.replace(a2=normal(6, 4, 2))
    one = lambda t, a, b: jnp.einsum("hwji,cj,io->hwco", t.reshape(3, 2, 2, 2), a, b)
    change = one(node.t1, node.a1, node.b1) * one(node.t2, node.a2, node.b2)
    np.testing.assert_allclose(node.value(), params["kernel"] + change, rtol=1e-4, atol=1e-5)
    plain = jpeft.loha(params, rank=2, sites=sites, targets="kernel")["kernel"]
    assert plain.a1.shape == (24, 2) and plain.t1 is None


def test_refuses():
    with pytest.raises(ValueError, match="rank of at least 1"):
        jpeft.loha({"w": W}, rank=0, targets="w")
