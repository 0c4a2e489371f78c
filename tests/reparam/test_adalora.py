"""What is known of AdaLoRA in closed form: its scale, its start, its mask, and the loss that keeps it orthogonal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

import jpeft


W = jax.random.normal(jax.random.key(0), (8, 6))
X = jax.random.normal(jax.random.key(1), (4, 8))
MASK = jnp.array([True, False, True, False])


def tuned(**options):
    node = jpeft.adalora({"w": W}, rank=4, targets="w", **options)["w"]
    return node.replace(a=normal(2, 8, 4), e=normal(3, 4), b=normal(4, 4, 6))


def product(node):
    return jpeft.apply(lambda params, x: x @ params["w"], {"w": node}, X)


def test_start():
    """W' = W; factors of deviation 0.02, and only the values have a gradient."""
    node = jpeft.adalora({"w": normal(0, 256, 128)}, rank=32, targets="w")["w"]
    np.testing.assert_array_equal(node.value(), node.base)
    np.testing.assert_allclose([jnp.std(node.a), jnp.std(node.b)], 0.02, rtol=0.05)
    gradient = jax.grad(lambda node: jnp.sum(jnp.sin(node.value())), allow_int=True)(node)
    assert np.all(gradient.a == 0) and np.all(gradient.b == 0) and np.all(gradient.e != 0)


def test_formula():
    node = tuned(alpha=6)
    assert node.scale == 6 / (4 + 1e-5) and tuned().scale == 1
    np.testing.assert_allclose(node.value(), W + node.scale * node.a @ jnp.diag(node.e) @ node.b, rtol=1e-4, atol=1e-5)


def test_lora_where_values_are_one():
    node = tuned(alpha=2)
    lora = jpeft.LoRA(base=W, a=node.a, b=node.b, scale=node.scale)
    np.testing.assert_allclose(product(node.replace(e=jnp.ones(4))), product(lora), rtol=1e-5)


def test_masked_triplets_are_as_removed():
    """With the same scale: that is of the rank at the start."""
    node = tuned(alpha=6).replace(mask=MASK)
    cut = node.replace(a=node.a[:, MASK], e=node.e[MASK], b=node.b[MASK], mask=jnp.ones(2, bool))
    np.testing.assert_allclose(product(node), product(cut), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(node.value(), cut.value(), rtol=1e-5, atol=1e-5)
    trainable, frozen = jpeft.partition({"w": node})
    gradient = jax.grad(lambda t: jnp.sum(product(jpeft.combine(t, frozen)["w"]) ** 2))(trainable)["w"]
    for found in (gradient.a.T, gradient.e, gradient.b):
        np.testing.assert_array_equal(np.reshape(found != 0, (4, -1)).all(1), MASK)
        np.testing.assert_array_equal(np.reshape(found == 0, (4, -1)).all(1), ~MASK)


def test_orthogonality():
    """|A^T A - I| and |B B^T - I|, not squared, and their mean over all matrices, each layer of a stack for one."""
    node = tuned()
    norms = [np.linalg.norm(g - np.eye(4)) for g in (node.a.T @ node.a, node.b @ node.b.T)]
    np.testing.assert_allclose(jpeft.orthogonality({"w": node}), np.mean(norms), rtol=1e-5)
    rows = jnp.eye(6)[:4]
    straight = node.replace(a=2 * jnp.eye(8)[:, :4], b=rows)
    np.testing.assert_allclose(jpeft.orthogonality({"w": straight}), 3, rtol=1e-6)  # (|3 I| + 0) / 2
    one = jpeft.adalora({"w": normal(0, 3, 8, 6)}, rank=4, targets={"w": "sio"})["w"]
    stack = one.replace(a=normal(5, 3, 8, 4), b=normal(6, 3, 4, 6))
    lone = [node.replace(a=stack.a[n], b=stack.b[n]) for n in range(3)]
    found = jpeft.orthogonality({"layers": stack, "head": node})
    np.testing.assert_allclose(found, np.mean([jpeft.orthogonality(x) for x in (*lone, node)]), rtol=1e-5)


def test_orthogonality_has_a_gradient():
    trainable, frozen = jpeft.partition({"w": tuned()})
    value, gradient = jax.value_and_grad(lambda t: jpeft.orthogonality(jpeft.combine(t, frozen)))(trainable)
    after = jax.tree.map(lambda x, g: x - 1e-3 * g, trainable, gradient)
    want = value - 1e-3 * sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient))
    np.testing.assert_allclose(jpeft.orthogonality(after), want, rtol=1e-3)
    with pytest.raises(ValueError, match="no AdaLoRA node"):
        jpeft.orthogonality(jpeft.lora({"w": W}, targets="w"))


def test_refuses():
    with pytest.raises(ValueError, match="rank of at least 1"):
        jpeft.adalora({"w": W}, rank=0, targets="w")
