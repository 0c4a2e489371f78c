"""What is known of DoRA in closed form: its norms, its start, its gradients, its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

import jpeft


W = jax.random.normal(jax.random.key(0), (7, 5))
X = jax.random.normal(jax.random.key(1), (4, 7))


def tuned(**options):
    """DoRA with random factors and magnitudes."""
    node = jpeft.dora({"w": W}, rank=2, targets="w", **options)["w"]
    return node.replace(a=normal(2, 7, 2), b=normal(3, 2, 5), magnitude=node.magnitude + normal(4, 5))


def product(node, **how):
    return jpeft.apply(lambda params, x: x @ params["w"], {"w": node}, X, **how)


def test_start():
    node = jpeft.dora({"w": W}, rank=2, targets="w")["w"]
    np.testing.assert_allclose(node.magnitude, jnp.linalg.norm(W, axis=0), rtol=1e-6)
    np.testing.assert_allclose(node.value(), W, rtol=1e-6)
    np.testing.assert_allclose(product(node), X @ W, rtol=1e-6, atol=1e-6)


def test_norms_are_magnitudes():
    """Of all weights into one output, with its sign: whatever the direction is."""
    node = tuned(alpha=6)
    np.testing.assert_allclose(jnp.linalg.norm(node.value(), axis=0), jnp.abs(node.magnitude), rtol=1e-5)
    v = W + 3 * node.a @ node.b
    np.testing.assert_allclose(node.value(), v / jnp.linalg.norm(v, axis=0)[None] * node.magnitude[None], rtol=1e-4)


def test_of_a_convolution_and_of_a_table():
    """The norm is over the window and the channels of one feature, and over the rows of a table."""
    for shape, axes, over in (((3, 2, 4, 5), "iiio", (0, 1, 2)), ((9, 4), "io", (0,)), ((3, 7, 5), "sio", (1,))):
        params = jpeft.dora({"w": normal(5, *shape)}, rank=2, targets={"w": axes})
        node = params["w"].replace(b=normal(6, *params["w"].b.shape))
        np.testing.assert_allclose(jnp.sqrt(jnp.sum(node.value() ** 2, axis=over)), node.magnitude, rtol=1e-5)


def test_lora_where_magnitudes_are_norms():
    node = tuned()
    lora = jpeft.LoRA(base=W, a=node.a, b=node.b, scale=node.scale)
    node = node.replace(magnitude=jnp.linalg.norm(lora.value(), axis=0))
    np.testing.assert_allclose(product(node), product(lora), rtol=1e-4, atol=1e-4)


def test_gradients_with_constant_norms():
    node = tuned(alpha=3)
    c = jnp.linalg.norm(W + node.scale * node.a @ node.b, axis=0)

    def by_hand(t):
        return jnp.sum(jnp.sin(X @ ((W + node.scale * t["a"] @ t["b"]) * (t["magnitude"] / c)[None])))

    loss = lambda node: jnp.sum(jnp.sin(product(node)))
    found = jax.grad(loss)(node)
    for name, want in jax.grad(by_hand)({n: getattr(node, n) for n in ("a", "b", "magnitude")}).items():
        np.testing.assert_allclose(getattr(found, name), want, rtol=1e-4, atol=1e-4)


def test_a_column_of_zeros():
    """Such as of a head that starts at zero: it stays, and nothing is NaN."""
    node = jpeft.dora({"w": W.at[:, 1].set(0)}, rank=2, targets="w")["w"]
    np.testing.assert_array_equal(node.value()[:, 1], 0)
    gradient = jax.grad(lambda node: jnp.sum(product(node) ** 2))(node)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


def test_dropout_is_of_the_term_alone():
    """The base's product is that of the whole input, and scaled with what is added to it."""
    node, key = tuned(dropout=0.5), jax.random.key(9)
    plain = node.replace(b=0 * node.b)
    np.testing.assert_array_equal(product(plain, rngs=key), product(plain))
    assert np.abs(product(node, rngs=key) - product(node)).max() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rank": 0}, "rank of at least 1"), ({"dropout": 1.0}, "dropout in"), ({"init": "loftq"}, "'loftq': one of")],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.dora({"w": W}, targets="w", **options)
