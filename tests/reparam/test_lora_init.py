"""The starts of LoRA's factors: bounds, moments, and which of them trains first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

import jpeft


def first_factor(init, d_in, rank):
    node = jpeft.lora({"kernel": jnp.zeros((d_in, 5))}, rank=rank, init=init, key=jax.random.key(4))["kernel"]
    np.testing.assert_array_equal(node.b, jnp.zeros((rank, 5)))
    return node.a


def test_init_uniform():
    a, bound = first_factor("uniform", 256, 32), 256**-0.5
    assert 0.99 * bound < np.abs(a).max() <= bound
    np.testing.assert_allclose([np.mean(a) / bound, np.std(a) / bound], [0, 3**-0.5], atol=0.02)


def test_init_gaussian():
    a = first_factor("gaussian", 256, 32)
    np.testing.assert_allclose([np.mean(a) * 32, np.std(a) * 32], [0, 1], atol=0.03)
    np.testing.assert_allclose(np.mean(np.abs(a) * 32 < 1), 0.6827, atol=0.02)


@pytest.mark.parametrize(("d_in", "rank"), [(32, 6), (6, 6), (4, 6)])
def test_init_orthogonal(d_in, rank):
    a = first_factor("orthogonal", d_in, rank)
    assert a.shape == (d_in, rank)
    product = a.T @ a if rank <= d_in else a @ a.T
    np.testing.assert_allclose(product, np.eye(min(d_in, rank)), atol=1e-6)


def test_init_of_a_stack_and_of_a_function():
    params = {"kernel": jnp.zeros((3, 8, 5)), "other": jnp.zeros((8, 5))}
    tuned = jpeft.lora(params, rank=2, targets={"kernel": "sio", "other": "io"})
    every = [*tuned["kernel"].a, tuned["other"].a]
    assert all(np.all(every[m] != every[n]) for m in range(4) for n in range(m))
    again = jpeft.lora(params, rank=2, targets={"kernel": "sio", "other": "io"}, key=jax.random.key(0))
    np.testing.assert_array_equal(again["kernel"].a, tuned["kernel"].a)
    ones = lambda key, d_in, rank, d_out: (jnp.ones((d_in, rank)), jnp.zeros((rank, d_out)))
    node = jpeft.lora(params, rank=2, targets={"kernel": "sio"}, init=ones)["kernel"]
    np.testing.assert_array_equal(node.a, jnp.ones((3, 8, 2)))


def test_init_embedding():
    """A = 0 and B ~ N(0, 1): it is A that trains at first, and only in the rows that are looked up."""
    params = jpeft.lora({"embedding": normal(0, 40, 256)}, rank=16, init={"emb.*": "embedding"}, targets={".*": "io"})
    node = params["embedding"]
    np.testing.assert_array_equal(node.a, jnp.zeros((40, 16)))
    np.testing.assert_allclose([np.mean(node.b), np.std(node.b)], [0, 1], atol=0.03)
    ids = jnp.array([3, 5, 5])
    loss = lambda params: jnp.sum(jpeft.apply(lambda p, ids: p["embedding"][ids], params, ids) ** 2)
    gradient = jax.grad(loss)(params)["embedding"]
    assert np.all(gradient.b == 0)
    np.testing.assert_array_equal(np.any(gradient.a != 0, axis=1), np.isin(np.arange(40), ids))
