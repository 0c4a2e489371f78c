"""KronA: by the dense product, as the LoKr that it is, with its residual, and beside a feed-forward block."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

import jpeft
from jpeft.testing import shaken


def close(found, want, tolerance=1e-5):
    np.testing.assert_allclose(found, want, rtol=0, atol=tolerance * np.abs(want).max())


def trained(node, key=7):
    trainable, frozen = jpeft.partition(node)
    return jpeft.combine(shaken(trainable, jax.random.key(key), 1.0), frozen)


@pytest.mark.parametrize("residual", [False, True])
def test_by_the_dense_product(residual):
    params = {"kernel": normal(0, 12, 12)}
    node = trained(jpeft.krona(params, decompose_factor=3, scale=0.5, residual=residual))["kernel"]
    assert node.a.shape == (3, 3) and node.b.shape == (4, 4)
    want = 0.5 * np.kron(node.a, node.b) + (float(node.residual) * np.eye(12) if residual else 0)
    x = normal(1, 2, 5, 12)
    close(node.value() - node.base, want)
    close(node.branch(x, None), x @ want)
    assert np.linalg.matrix_rank(np.kron(node.a, node.b)) == 12  # of 25 numbers


def test_lokr_of_two_arrays_is_krona():
    """Values and gradients, by the same loss."""
    params = {"kernel": normal(0, 12, 8)}
    krona, lokr = trained(jpeft.krona(params)), jpeft.lokr(params, rank=8, init="lycoris")
    k = krona["kernel"]
    lokr = {"kernel": lokr["kernel"].replace(w1=k.a, w2=k.b)}
    close(jpeft.merge(krona)["kernel"], jpeft.merge(lokr)["kernel"])
    loss = lambda tree: jnp.sum(jnp.sin(jpeft.merge(tree)["kernel"]))
    found, want = jax.grad(loss)(krona)["kernel"], jax.grad(loss)(lokr)["kernel"]
    close(found.a, want.w1)
    close(found.b, want.w2)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(12, name="down")(nn.relu(nn.Dense(20, name="up")(x)))


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + Block(name="mlp")(x)


def test_beside_a_block():
    """The whole block's input goes through the product and, with a residual, past it."""
    x = normal(0, 2, 12)
    base = Model().init(jax.random.key(1), x)["params"]
    sites = jpeft.sites(Model(), {"params": base}, x)
    start = jpeft.krona(base, placement="parallel", residual=True, scale=2.0, sites=sites)
    close(jpeft.apply(Model(), {"params": start}, x), Model().apply({"params": base}, x))
    tuned = start["mlp"]["krona"] = trained(start["mlp"]["krona"])
    plain = Model().apply({"params": base}, x)
    want = plain + 2 * x @ np.kron(tuned.a, tuned.b) + float(tuned.residual) * x
    close(jpeft.apply(Model(), {"params": start}, x), want)
    with pytest.raises(ValueError, match="mlp/krona: ParallelKronA, which acts on activations"):
        jpeft.merge(start)


def test_start():
    node = jpeft.krona({"kernel": normal(0, 64, 36)}, residual=False)["kernel"]
    np.testing.assert_array_equal(node.value(), node.base)
    assert node.a.shape == (8, 6) and node.b.shape == (8, 6) and node.residual is None
    assert 0 < jnp.abs(node.a).max() <= 8**-0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual": True}, "12 features cannot be added to 8"),
        ({"placement": "serial"}, "'serial': one of kernel, parallel"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.krona({"kernel": normal(0, 12, 8)}, **options)
