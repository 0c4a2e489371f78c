"""What is known of DeLoRA in closed form: its bound, what does not change it, and its start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

import jpeft


W, RANK = normal(0, 8, 6), 3
NORMS = jnp.linalg.norm(W, axis=1)


def node_of(w=W, **options):
    return jpeft.delora({"w": w}, targets="w", **{"rank": RANK, **options})["w"]


def size(node):
    """The Frobenius norm of the change, in units of the norms of the rows of W."""
    return jnp.linalg.norm((node.value() - W) / NORMS[:, None])


def test_formula():
    node = node_of(bound=2.0).replace(a=normal(1, 8, RANK), b=normal(2, RANK, 6))
    a, b = np.asarray(node.a), np.asarray(node.b)
    terms = [np.outer(a[:, k], b[k]) / np.linalg.norm(a[:, k]) / np.linalg.norm(b[k]) for k in range(RANK)]
    np.testing.assert_allclose(node.norms, NORMS, rtol=1e-6)
    np.testing.assert_allclose(node.value(), W + 2 / 3 * np.asarray(NORMS)[:, None] * sum(terms), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_bound(seed):
    """The change is never larger than lambda, as large where all directions are one, and less at right angles."""
    free = node_of(bound=-4.0).replace(a=100 * normal(seed, 8, RANK), b=normal(seed + 9, RANK, 6))
    assert 0.1 < size(free) < 4
    one = free.replace(a=jnp.tile(free.a[:, :1], (1, RANK)), b=jnp.tile(free.b[:1], (RANK, 1)))
    np.testing.assert_allclose(size(one), 4, rtol=1e-5)
    right = free.replace(a=jnp.eye(8)[:, :RANK], b=jnp.eye(6)[:RANK])
    np.testing.assert_allclose(size(right), 4 / RANK**0.5, rtol=1e-5)


def test_sizes_of_factors_do_not_matter():
    node = node_of().replace(a=normal(1, 8, RANK), b=normal(2, RANK, 6))
    factors = jnp.array([0.1, 3.0, 50.0])
    same = node.replace(a=node.a * factors[None], b=node.b / 7)
    np.testing.assert_allclose(same.value(), node.value(), rtol=1e-4, atol=1e-4)
    assert np.abs(node.replace(a=-node.a).value() - node.value()).max() > 0.1


def test_start():
    """W' = W, lambda is what was asked for, and near B = 0 it is a LoRA, as B's norms count as 1e-4 there."""
    node = node_of(bound=5.0)
    np.testing.assert_array_equal(node.value(), W)
    assert node.bound.shape == () and node.bound == 5
    unit = node.a / jnp.linalg.norm(node.a, axis=0)[None]
    lora = jpeft.LoRA(base=W, a=NORMS[:, None] * unit, b=node.b, scale=5 / RANK / 1e-4)
    loss = lambda node: jnp.sum(jnp.sin(node.value()))
    found, want = jax.grad(loss)(node), jax.grad(loss)(lora)
    np.testing.assert_allclose(found.b, want.b, rtol=1e-4)
    assert np.all(found.b != 0) and np.all(found.a == 0) and found.bound == 0


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_start_in_half_precision(dtype):
    """Norms of zero are none in float16 either, whose smallest number is above 1e-8."""
    w, x = W.astype(dtype), normal(1, 5, 8).astype(dtype)
    fn = lambda params, x: x @ params["w"]
    np.testing.assert_array_equal(jpeft.apply(fn, {"w": node_of(w)}, x), fn({"w": w}, x))


def test_each_layer_of_a_stack_has_its_own_bound():
    node = jpeft.delora({"w": normal(3, 4, 8, 6)}, targets={"w": "sio"})["w"]
    assert (node.bound.shape, node.norms.shape) == ((4,), (4, 8))
    node = node.replace(b=normal(4, *node.b.shape), bound=jnp.array([0.0, 1, 2, 3]))
    change = np.asarray((node.value() - node.base) / node.norms[..., None])
    sizes = np.linalg.norm(change, axis=(1, 2))
    assert sizes[0] == 0 and np.all(sizes[1:] > 0.1) and np.all(sizes <= [0, 1, 2, 3])


def test_refuses():
    with pytest.raises(ValueError, match="rank of at least 1"):
        node_of(rank=0)
