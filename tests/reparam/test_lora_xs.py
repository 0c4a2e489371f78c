"""What is known of LoRA-XS in closed form: where its change lies, and which matrix gives the kernel's own part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

import jpeft


W, RANK = normal(0, 8, 6), 3
U, VALUES, V = jnp.linalg.svd(W, full_matrices=False)


def node_of(w=W, **options):
    return jpeft.lora_xs({"w": w}, targets="w", **{"rank": RANK, **options})["w"]


def test_identity_gives_the_principal_part():
    """A holds the singular values, B none of them; with R = I the change is the part of rank r of W."""
    node = node_of(alpha=6)
    np.testing.assert_allclose(node.a.T @ node.a, jnp.diag(VALUES[:RANK] ** 2), atol=1e-4)
    np.testing.assert_allclose(node.b @ node.b.T, jnp.eye(RANK), atol=1e-5)
    part = U[:, :RANK] * VALUES[None, :RANK] @ V[:RANK]
    np.testing.assert_allclose(node.replace(r=jnp.eye(RANK)).value(), W + 2 * part, atol=1e-5)


def test_change_is_between_the_first_singular_vectors():
    change = node_of().replace(r=normal(1, RANK, RANK)).value() - W
    assert np.abs(change).max() > 0.1
    left, right = U[:, :RANK] @ U[:, :RANK].T, V[:RANK].T @ V[:RANK]
    np.testing.assert_allclose(left @ change @ right, change, atol=1e-4)
    assert np.linalg.matrix_rank(change, rtol=1e-4) == RANK


def test_start():
    """The base is whole; R is of the deviation asked for, or zero, and trains from the first step on."""
    node = node_of()
    np.testing.assert_array_equal(node.base, W)
    np.testing.assert_allclose(node.value(), W, atol=1e-3)
    assert 1e-6 < np.abs(node.r).max() < 1e-4
    wide = jpeft.lora_xs({"w": normal(2, 64, 64)}, rank=64, deviation=0.5, targets="w")["w"]
    np.testing.assert_allclose([np.mean(wide.r), np.std(wide.r)], [0, 0.5], atol=0.03)
    exact = node_of(deviation=0.0)
    np.testing.assert_array_equal(exact.value(), W)
    assert np.all(jax.grad(lambda node: jnp.sum(node.value() ** 2))(exact).r[jnp.diag_indices(RANK)] != 0)


def test_randomized_is_exact_where_values_fall_off():
    u, v = jnp.linalg.qr(normal(2, 40, 40))[0], jnp.linalg.qr(normal(3, 30, 30))[0]
    w = u[:, :30] * 0.7 ** jnp.arange(30.0)[None] @ v
    exact, found = node_of(w), node_of(w, iterations=2)
    np.testing.assert_allclose(found.a @ found.b, exact.a @ exact.b, atol=1e-3)
    assert np.abs(exact.a @ exact.b).max() > 0.1


def test_of_a_quantized_stack():
    """The vectors are those of what the codes say, for each layer its own."""
    base = jpeft.int8({"w": normal(4, 3, 32, 16)}, targets={"w": "sio"})
    node = jpeft.lora_xs(base, rank=2, targets={"w": "sio"})["w"]
    for n, w in enumerate(base["w"].value()):
        u, s, v = jnp.linalg.svd(w, full_matrices=False)
        np.testing.assert_allclose(node.a[n] @ node.b[n], u[:, :2] * s[None, :2] @ v[:2], atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rank": 7}, "8 inputs and 6 outputs has no part of rank 7"), ({"rank": 0}, "rank of at least 1")],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        node_of(**options)
