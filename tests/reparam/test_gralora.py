"""What is known of GraLoRA in closed form: its blocks, their ranks, and that one block is LoRA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

import jpeft


W, X = normal(0, 12, 8), normal(1, 5, 12)


def run(node, x=X):
    return jpeft.apply(lambda params, x: x @ params["w"], {"w": node}, x)


def tuned(w=W, **options):
    """GraLoRA with random arrays."""
    params = jpeft.gralora({"w": w}, targets="w", **{"rank": 4, **options})
    trainable, frozen = jpeft.partition(params)
    return jpeft.combine(jax.tree.map(lambda x: x + normal(2, *x.shape), trainable), frozen)["w"]


def test_one_block_is_lora():
    node = tuned(blocks=1, alpha=6)
    lora = jpeft.LoRA(base=W, a=node.a[0], b=node.b[0], scale=1.5)
    np.testing.assert_allclose(run(node), run(lora), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [2, 4])
def test_blocks(k):
    """Block (i, j) is A_i's j-th columns times B_j's i-th rows."""
    node, s = tuned(blocks=k), 4 // k
    rows = [[node.a[i][:, j * s : (j + 1) * s] @ node.b[j][i * s : (i + 1) * s] for j in range(k)] for i in range(k)]
    np.testing.assert_allclose(node.value(), W + jnp.block(rows), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(run(node), X @ node.value(), rtol=1e-4, atol=1e-4)
    assert [np.linalg.matrix_rank(block, rtol=1e-4) for row in rows for block in row] == [min(s, 8 // k)] * k * k


def test_rank_is_the_larger_by_the_number_of_blocks():
    """With as many parameters as LoRA of rank 4."""
    for k, rank in ((1, 4), (2, 8), (4, 16)):
        node = tuned(jnp.zeros((32, 32)), blocks=k)
        assert node.a.size + node.b.size == 4 * (32 + 32)
        assert np.linalg.matrix_rank(node.value(), rtol=1e-4) == rank


def test_hybrid_is_lora_beside_it():
    node = tuned(hybrid=2, alpha=3)
    assert node.scale == 0.5
    alone = node.replace(whole_a=None, whole_b=None)
    beside = jpeft.LoRA(base=alone, a=node.whole_a, b=node.whole_b, scale=0.5)
    np.testing.assert_allclose(node.value(), beside.value(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(run(node), run(beside), rtol=1e-4, atol=1e-4)


def test_start():
    """W' = W; A is uniform, by the inputs of a block."""
    node = jpeft.gralora({"w": normal(0, 512, 64)}, rank=8, blocks=4, hybrid=6, targets="w")["w"]
    np.testing.assert_array_equal(node.value(), node.base)
    for x, fan in ((node.a, 128), (node.whole_a, 512)):
        assert 0.98 * fan**-0.5 < np.abs(x).max() <= fan**-0.5


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 5, 12)])
def test_inputs_of_any_shape(shape):
    node, x = tuned(hybrid=2), normal(3, *shape)
    np.testing.assert_allclose(run(node, x), x @ node.value(), rtol=1e-4, atol=1e-4)


def test_costs_as_lora_does():
    """Beside the base's, products through A and through B: 2 r (in + out) operations a row, and no kernel."""
    flops = lambda node: jax.jit(lambda x: node.branch(x, None)).lower(X).cost_analysis()["flops"]
    lora = jpeft.lora({"w": W}, rank=4, targets="w")["w"]
    assert flops(tuned(blocks=2)) <= 1.1 * flops(lora)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 3}, r"does not divide these:\n  one: 12 inputs, 8 outputs, blocks=3\n  two: 8 inputs, 8 out"),
        ({"blocks": {"one": 5, ".*": 2}}, r"these:\n  one: 12 inputs, 8 outputs, blocks=5\nTake another `blocks`"),
        ({"blocks": 4, "rank": 6}, "`blocks` must divide the rank"),
        ({"hybrid": -1}, "`hybrid` be at least 0"),
        ({"rank": 0}, "rank of at least 1"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.gralora({"one": W, "two": W[:8]}, targets=".*", **options)
