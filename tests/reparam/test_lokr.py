"""What is known of LoKr in closed form: the dense Kronecker product, its rank, and how sizes are factored."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from hypothesis import given, settings
from hypothesis import strategies as st

import jpeft
from jpeft.reparam._lokr import factorization


PEFT = np.load(Path(__file__).parents[1] / "fixtures" / "reparam" / "peft.npz")["factorization"]
SIZE = st.integers(1, 4)


def test_factorization():
    """That of PEFT, for sizes below 150 and several factors."""
    found = [factorization(int(size), int(factor)) for size, factor, *_ in PEFT]
    np.testing.assert_array_equal(found, PEFT[:, 2:])


@given(st.integers(1, 10**5), st.integers(-1, 64))
def test_factorization_is_of_divisors(size, factor):
    small, large = factorization(size, factor)
    assert small * large == size
    assert small <= large or small == factor


@settings(max_examples=6, deadline=None)  # each is compiled
@given(SIZE, SIZE, SIZE, SIZE)
def test_dense(in1, out1, in2, out2):
    """The value and the branch are those of the dense product; its rank is the product of the ranks."""
    random = np.random.default_rng(0)
    w1, w2, x = (random.normal(size=s).astype("f") for s in ((in1, out1), (in2, out2), (2, 3, in1 * in2)))
    node = jpeft.LoKr(w1=jnp.asarray(w1), w2=jnp.asarray(w2), scale=2.0)
    dense = 2 * np.kron(w1, w2)
    np.testing.assert_allclose(node.weight(jnp.zeros(dense.shape)), dense, rtol=1e-5)
    np.testing.assert_allclose(node.branch(jnp.asarray(x), None), x @ dense, rtol=1e-4, atol=1e-4)
    assert np.linalg.matrix_rank(dense) == min(in1, out1) * min(in2, out2)


@pytest.mark.parametrize(("init", "trained"), [("peft", (True, False)), ("lycoris", (False, True))])
@pytest.mark.parametrize("both", [False, True])
def test_start(init, both, trained):
    """W' = W, and it is one factor of the matrix that is zero whose gradient is not."""
    params = jpeft.lokr({"w": normal(0, 64, 36)}, rank=1, init=init, decompose_both=both, targets="w")
    node = params["w"]
    np.testing.assert_array_equal(node.value(), node.base)
    gradient = jax.grad(lambda node: jnp.sum(jnp.sin(node.value())))(node)
    moves = lambda part: any(np.any(g != 0) for g in jax.tree.leaves(part))
    assert (moves(gradient.w1), moves(gradient.w2)) == trained


def test_shapes():
    shapes = lambda **how: jax.tree.map(jnp.shape, jpeft.lokr({"w": normal(0, 64, 36)}, targets="w", **how)["w"])
    assert shapes(rank=3).w1 == (8, 6) and shapes(rank=3).w2 == ((8, 3), (3, 6))
    assert shapes(rank=4).w2 == (8, 6)
    assert shapes(rank=3, decompose_both=True).w1 == ((8, 3), (3, 6))
    assert shapes(rank=8, decompose_factor=4).w1 == (4, 4) and shapes(rank=8, decompose_factor=4).w2 == (16, 9)
    assert shapes(rank=4, alpha=2).scale == 0.5


def test_scale_of_arrays():
    """LyCORIS takes 1 where neither matrix is factored; PEFT, and so the default, alpha / rank."""
    scale = lambda **how: jpeft.lokr({"w": normal(0, 64, 36)}, targets="w", alpha=2, **how)["w"].scale
    assert scale(rank=4) == 0.5 and scale(rank=4, scale_arrays=False) == 1.0
    assert scale(rank=3, scale_arrays=False) == 2 / 3  # W2 is factored
    assert scale(rank=3, decompose_both=True, scale_arrays=False) == 2 / 3


@pytest.mark.parametrize(
    ("options", "message"), [({"rank": 0}, "rank of at least 1"), ({"init": "x"}, "'peft' starts")]
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.lokr({"w": normal(0, 4, 4)}, targets="w", **options)
