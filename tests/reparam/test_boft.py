"""Butterflies: by dense matrices and permutations, and with one factor as OFT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft


W = jax.random.normal(jax.random.key(0), (16, 5))


def close(found, want):
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * np.abs(want).max())


def node(factors, block=2):
    z = jax.random.normal(jax.random.key(1), (factors, 16 // block, block, block))
    return jpeft.BOFT(base=W, z=z, scale=jnp.ones(5))


def order(n, block):
    """The inputs in the order in which a factor's blocks take them: of pairs of half blocks, 2**n apart."""
    half = block // 2
    pairs = [(start + k, start + 2**n + k) for start in range(0, 16 // half, 2 ** (n + 1)) for k in range(2**n)]
    return [half * chunk + k for pair in pairs for chunk in pair for k in range(half)]


@pytest.mark.parametrize(("factors", "block"), [(1, 2), (4, 2), (3, 4), (1, 16)])
def test_by_dense_matrices(factors, block):
    boft, product = node(factors, block), np.eye(16)
    for n, z in enumerate(np.asarray(boft.z, np.float64)):
        blocks = np.zeros((16, 16))
        for k, s in enumerate((z - z.swapaxes(1, 2)) / 2):
            at = slice(block * k, block * k + block)
            blocks[at, at] = (np.eye(block) - s) @ np.linalg.inv(np.eye(block) + s)
        p = np.eye(16)[:, order(n, block)]
        product = p @ blocks @ p.T @ product
    close(product @ product.T, np.eye(16))
    close(boft.value(), product @ np.asarray(W))
    size = block * 2 ** (factors - 1)  # of blocks in which everything is mixed, and nothing else
    np.testing.assert_array_equal(np.abs(product) > 1e-9, np.kron(np.eye(16 // size), np.ones((size, size))))


def test_one_factor_is_oft():
    rows, columns = np.triu_indices(4, 1)
    boft = node(1, 4)
    generators = ((boft.z - boft.z.mT) / 2)[0][:, rows, columns]
    close(boft.value(), jpeft.OFT(base=W, generators=generators, block=4, cayley="exact").value())


def test_scale_is_of_the_outputs():
    scale = jnp.arange(1.0, 6.0)
    close(node(2).replace(scale=scale).value(), node(2).value() * scale[None])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 3}, "16 inputs divided.*block=3"),
        ({"block": 8, "factors": 3}, "block=8 and factors=3"),
        ({"block": 1}, "at least 2 inputs"),
        ({"factors": 0}, "factors=0"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.boft({"kernel": W}, **options)
