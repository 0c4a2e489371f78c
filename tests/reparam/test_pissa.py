"""What is known of PiSSA and OLoRA in closed form: their starts, what is left of the kernel, and that they are LoRA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

import jpeft


W = jax.random.normal(jax.random.key(0), (8, 6))
STARTS = {"pissa": jpeft.pissa, "olora": jpeft.olora, "randomized": jpeft.pissa(iterations=2)}


def node_of(start, w=W, **options):
    return STARTS[start]({"w": w}, targets="w", **{"rank": 2, **options})["w"]


@pytest.mark.parametrize("start", STARTS)
def test_start(start):
    """W' is W to the bit, the base is untouched, and both factors train from the first step."""
    node = node_of(start, alpha=6)
    np.testing.assert_array_equal(node.value(), W)
    np.testing.assert_array_equal(node.base, W)
    x = normal(1, 3, 8)
    run = lambda node: jpeft.apply(lambda params, x: x @ params["w"], {"w": node}, x)
    np.testing.assert_array_equal(run(node), x @ W)
    gradient = jax.grad(lambda node: jnp.sum(run(node) ** 2))(node)
    assert np.all(gradient.a != 0) and np.all(gradient.b != 0)


@pytest.mark.parametrize("alpha", [None, 2, 6])
def test_principal_part(alpha):
    """The singular values of the residual are those after the first r; each factor has the root of the first r."""
    node = node_of("pissa", rank=3, alpha=alpha)
    values = jnp.linalg.svd(W, compute_uv=False)
    left = W - node.scale * node.start_a @ node.start_b
    np.testing.assert_allclose(jnp.linalg.svd(left, compute_uv=False), jnp.append(values[3:], jnp.zeros(3)), atol=1e-5)
    for gram in (node.a.T @ node.a, node.b @ node.b.T):
        np.testing.assert_allclose(node.scale * gram, jnp.diag(values[:3]), atol=1e-5)


def test_randomized_is_exact_where_values_fall_off():
    u, v = jnp.linalg.qr(normal(2, 40, 40))[0], jnp.linalg.qr(normal(3, 30, 30))[0]
    w = u[:, :30] * 0.7 ** jnp.arange(30.0)[None] @ v
    exact, found = node_of("pissa", w, rank=4), node_of("randomized", w, rank=4)
    np.testing.assert_allclose(found.a @ found.b, exact.a @ exact.b, atol=1e-3)
    assert np.abs(found.a @ found.b).max() > 0.1


def test_orthonormal_part():
    """B B^T = I, and of the torch weight nothing is left in the span of Q's first columns."""
    node = node_of("olora", rank=3, alpha=6)
    np.testing.assert_allclose(node.b @ node.b.T, jnp.eye(3), atol=1e-6)
    np.testing.assert_allclose((W - node.a @ node.b) @ node.b.T, jnp.zeros((8, 3)), atol=1e-5)
    q, r = np.linalg.qr(np.asarray(W).T)
    np.testing.assert_allclose(node.a @ node.b, (q[:, :3] @ r[:3]).T, atol=1e-5)


def test_is_lora_on_the_residual_and_lora_of_twice_the_rank():
    node = node_of("pissa", alpha=5)
    node = node.replace(a=normal(2, 8, 2), b=normal(3, 2, 6))
    rest = W - node.scale * node.start_a @ node.start_b
    on_rest = jpeft.LoRA(base=rest, a=node.a, b=node.b, scale=node.scale)
    np.testing.assert_allclose(node.value(), on_rest.value(), rtol=1e-5, atol=1e-5)
    a, b = jnp.concatenate([node.a, node.start_a], axis=1), jnp.concatenate([node.b, -node.start_b])
    twice = jpeft.LoRA(base=W, a=a, b=b, scale=node.scale)
    np.testing.assert_allclose(node.value(), twice.value(), rtol=1e-5, atol=1e-5)


def test_dropout_is_of_the_trained_term_alone():
    node, x, key = node_of("pissa", dropout=0.5), normal(1, 3, 8), jax.random.key(9)
    run = lambda node: jpeft.apply(lambda params, x: x @ params["w"], {"w": node}, x, rngs=key)
    left = x @ (W - node.start_a @ node.start_b)
    np.testing.assert_allclose(run(node.replace(b=0 * node.b)), left, rtol=1e-4, atol=1e-4)
    assert np.abs(run(node) - x @ W).max() > 0.1


@pytest.mark.parametrize("start", STARTS)
def test_of_half_precision_and_of_a_stack(start):
    w = normal(4, 3, 8, 6).astype(jnp.bfloat16)
    node = STARTS[start]({"w": w}, rank=2, targets={"w": "sio"})["w"]
    assert node.a.dtype == jnp.float32 and node.a.shape == (3, 8, 2)
    np.testing.assert_array_equal(node.value(), w)
    assert node.value().dtype == jnp.bfloat16


def test_of_experts():
    params = jpeft.pissa({"w": normal(4, 3, 8, 6)}, rank=2, targets={"w": "sio"})
    params = {"w": params["w"].replace(b=normal(5, 3, 2, 6))}
    fn = lambda params, x: jax.lax.ragged_dot(x, params["w"], jnp.array([2, 0, 3]))
    x = normal(1, 5, 8)
    assert set(jpeft.coverage(fn, params, x).values()) == {"branched"}
    np.testing.assert_allclose(jpeft.apply(fn, params, x), fn(jpeft.merge(params), x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rank": 7}, "8 inputs and 6 outputs has no part of rank 7"), ({"rank": 0}, "rank of at least 1")],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.pissa({"w": W}, targets="w", **options)
