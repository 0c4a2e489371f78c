"""Blocks of rotations: orthogonal or nearly, in which sense, and as one dense matrix."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_layers import check_gradients, check_outputs, of_case

import jpeft


W = jax.random.normal(jax.random.key(0), (12, 5))


def node(block, *, blocks=None, size=0.1, **options):
    shape = (blocks or 12 // block, block * (block - 1) // 2)
    return jpeft.OFT(base=W, generators=size * jax.random.normal(jax.random.key(1), shape), block=block, **options)


def skew(row, block):
    q = np.zeros((block, block))
    q[np.triu_indices(block, 1)] = row
    return q - q.T


def close(found, want, tolerance=1e-5):
    np.testing.assert_allclose(found, want, rtol=0, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("blocks", [3, 1])
def test_exact_by_a_dense_matrix(blocks):
    """Of one block for all, or each its own."""
    oft = node(4, blocks=blocks, cayley="exact", size=1.0)
    r = np.zeros((12, 12))
    for n in range(3):
        q = skew(oft.generators[n % blocks], 4)
        r[4 * n : 4 * n + 4, 4 * n : 4 * n + 4] = (np.eye(4) - q) @ np.linalg.inv(np.eye(4) + q)
    close(r @ r.T, np.eye(12))
    close(oft.value(), r @ np.asarray(W))
    close(jnp.linalg.norm(oft.value(), axis=0), jnp.linalg.norm(W, axis=0))  # rotated columns are as long
    close(oft.value().T @ oft.value(), W.T @ W)  # and at the same angles to one another


@pytest.mark.parametrize("terms", [2, 4, 5, 8])
def test_series(terms):
    q = skew(node(4, blocks=1).generators[0], 4)
    powers = [np.linalg.matrix_power(q, n) for n in range(terms)]
    want = np.eye(4) + 2 * sum(powers[1:-1]) + (powers[-1] if terms > 2 else 2 * powers[-1])
    close(node(4, blocks=1, terms=terms).rotations()[0], want)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**30), size=st.floats(0.001, 0.15))
def test_the_two_turn_in_opposite_senses(seed, size):
    """The series is the exact rotation the other way round, but for powers that it leaves out."""
    row = size * jax.random.normal(jax.random.key(seed), (1, 6))
    q = jnp.linalg.norm(skew(row[0], 4), 2)
    of = lambda **options: jpeft.OFT(generators=row, block=4, **options).rotations()[0]
    series, exact = of(terms=6), of(cayley="exact")
    left_out = 4 * q**5 / (1 - min(q, 0.9))
    assert np.abs(series - exact.T).max() <= left_out + 1e-5
    assert np.abs(series - exact).max() >= q - left_out - 1e-5  # 2 (Q + Q^3 + ...) less what is left out


def test_a_truncated_series_is_not_orthogonal_far_from_the_start():
    off = lambda size: np.abs(np.eye(12) - (r := node(12, size=size).rotations()[0]) @ r.T).max()
    assert off(0.01) < 3e-5 and off(0.3) > 1


def test_bound():
    """COFT: each Q no larger than epsilon / sqrt(blocks); smaller ones are as they are."""
    generators = jnp.stack([jnp.full(6, 1.0), jnp.full(6, 0.001), jnp.zeros(6)])
    bound = 0.2 / 3**0.5
    scaled = generators.at[0].set(bound / 12**0.5)  # of norm sqrt(12)
    of = lambda rows, **options: jpeft.OFT(generators=rows, block=4, **options).rotations()
    close(of(generators, epsilon=0.2), of(scaled))
    gradient = jax.grad(lambda g: jnp.sum(of(g, epsilon=0.2) ** 3))(generators)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("stack", [(), (2,)])
def test_projection_between_steps(stack):
    """It is what the bound does in the forward pass, and once done it changes nothing. Others than OFT's it leaves."""
    generators = jax.random.normal(jax.random.key(1), (*stack, 3, 6))
    generators = generators.at[..., 1, :].multiply(0.01).at[..., 2, :].set(0)
    tree = {"a": jpeft.OFT(generators=generators, block=4), "b": jnp.ones(3)}
    once = jax.jit(lambda tree: jpeft.bounded(tree, epsilon=0.2))(tree)
    norms = jnp.sqrt(2 * jnp.sum(once["a"].generators ** 2, axis=-1))
    np.testing.assert_allclose(norms[..., 0], 0.2 / 3**0.5, rtol=1e-5)
    np.testing.assert_array_equal(once["a"].generators[..., 1:, :], generators[..., 1:, :])
    np.testing.assert_array_equal(once["b"], tree["b"])
    close(jpeft.bounded(once, epsilon=0.2)["a"].generators, once["a"].generators, 1e-6)
    if not stack:
        bounded = tree["a"].replace(epsilon=0.2)
        close(once["a"].rotations(), bounded.rotations(), 1e-6)


def test_projection_is_that_of_peft():
    """PEFT projects in every forward pass, past what gradients see: outputs and gradients are those after it."""
    arrays = of_case("additive/peft.npz", "coft")
    params = {"kernel": jnp.asarray(arrays["weight"].T), "bias": jnp.asarray(arrays["bias"])}
    params = jpeft.oft(params, block=4)
    params["kernel"] = params["kernel"].replace(generators=jnp.asarray(arrays["p/oft_R.weight"]))
    params = jpeft.bounded(params, epsilon=0.2)
    model = nn.Dense(len(arrays["weight"]))
    check_outputs(model, params, arrays["x"], arrays["y"])
    check_gradients(model, params, "kernel", arrays["x"], {"generators": arrays["g/oft_R.weight"]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 5}, "divide a kernel's 12, not 5"),
        ({"block": 1}, "at least 2 inputs.*not 1"),
        ({"cayley": "approximate"}, "'neumann' or 'exact'"),
        ({"block": 4, "terms": 1}, "at least 2 terms.*terms=1"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.oft({"kernel": W}, **options)
