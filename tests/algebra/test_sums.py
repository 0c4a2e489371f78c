"""Exact sums: cat, linear and subtract, against what the merged trees say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tuned_trees import AXES, BASE, changes, loras, off, tuned, weighted

import jpeft
from jpeft import algebra


EXACT = 3e-6  # changes are differences of merged kernels in float32
LORAS = loras()
MIXED = [
    LORAS[0],
    tuned(jpeft.dora, 4, rank=2),
    tuned(jpeft.loha, 5, rank=2, size=0.5),
    tuned(jpeft.delta, 6),
    tuned(jpeft.vera, 7, rank=4),
]
WEIGHTS = st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3)
few = settings(max_examples=10, deadline=None, derandomize=True)


def node(tree, path):
    return tree[path.partition("/")[0]]["kernel"]


def test_cat_has_the_factors_side_by_side():
    merged = algebra.cat(LORAS, weights=[1.0, -2.0, 0.5])
    first, second = (node(tree, "heads/kernel") for tree in LORAS[:2])
    found = node(merged, "heads/kernel")
    assert isinstance(found, jpeft.LoRA) and found.scale == 1.0 and found.base is BASE["heads"]["kernel"]
    np.testing.assert_array_equal(found.a, np.concatenate([first.a, second.a], axis=1))
    b = np.concatenate([3.0 * np.asarray(first.b), -2.0 * 5 / 3**0.5 * np.asarray(second.b)])
    np.testing.assert_allclose(found.b, b, rtol=1e-6)
    assert {path: node(merged, path).a.shape[-1] for path in AXES} == {
        "dense/kernel": 6, "heads/kernel": 5, "layers/kernel": 6, "conv/kernel": 5,
    }  # fmt: skip


def test_cat_is_exact_in_double_precision():
    """Against s A B of every adapter, in float64, without a merge that would round."""
    weights = [1.3, -2.1, 0.7]
    merged = algebra.cat(LORAS, weights=weights)
    for path in AXES:
        product = lambda x: x.scale * (np.asarray(x.a, np.float64) @ np.asarray(x.b, np.float64))
        nodes = [node(tree, path) for tree in LORAS]
        wanted = sum(w * product(x) for w, x in zip(weights, nodes, strict=True) if isinstance(x, jpeft.LoRA))
        assert np.linalg.norm(product(node(merged, path)) - wanted) < 1e-6 * np.linalg.norm(wanted)


@pytest.mark.parametrize("trees", [LORAS, LORAS[::-1], MIXED], ids=["loras", "of the first only a part", "mixed"])
def test_linear_is_the_sum_of_all_that_changes_weights(trees):
    weights = [0.5, -1.5, 1.0, 2.0, -0.7][: len(trees)]
    merged = algebra.linear(trees, weights=weights)
    kinds = {type(node(merged, path)) for path in AXES}
    assert kinds == ({jpeft.Delta} if trees is MIXED else {jpeft.LoRA})
    assert off(changes(merged), weighted(trees, weights)) < EXACT


@few
@given(WEIGHTS, WEIGHTS)
def test_linear_in_the_weights(u, v):
    total = weighted([algebra.linear(LORAS, weights=u), algebra.linear(LORAS, weights=v)], [1, 1])
    found = changes(algebra.linear(LORAS, weights=[a + b for a, b in zip(u, v, strict=True)]))
    for path, wanted in total.items():
        np.testing.assert_allclose(found[path], wanted, atol=3e-5)


@few
@given(WEIGHTS, st.permutations(range(3)))
def test_the_order_does_not_matter(weights, order):
    found = changes(algebra.linear([LORAS[n] for n in order], weights=[weights[n] for n in order]))
    for path, wanted in changes(algebra.linear(LORAS, weights=weights)).items():
        np.testing.assert_allclose(found[path], wanted, atol=3e-5)


@pytest.mark.parametrize("tree", [*LORAS, MIXED[1]], ids=["alpha", "rslora", "part", "dora"])
def test_one_adapter(tree):
    assert off(changes(algebra.linear([tree])), changes(tree)) < EXACT
    assert off(changes(algebra.linear([tree], weights=[-1])), weighted([tree], [-1])) < EXACT


def test_subtract():
    a, b = LORAS[:2]
    assert off(changes(algebra.subtract(a, b)), weighted([a, b], [1, -1])) < EXACT
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), jpeft.merge(algebra.subtract(a, a)), BASE)
    same = algebra.subtract(MIXED[1], MIXED[1])  # of equal matrices the difference is zero, and not nearly so
    jax.tree.map(np.testing.assert_array_equal, jpeft.merge(same), BASE)


def test_terms_on_terms_and_a_start_in_the_kernel():
    """A LoRA on a PiSSA: three products, and no base in them."""
    both = tuned(jpeft.lora, 9, rank=1, alpha=2, on=tuned(jpeft.pissa, 8, rank=2, alpha=4))
    merged = algebra.cat([both, LORAS[0]], weights=[2, 1])
    assert node(merged, "conv/kernel").a.shape == (12, 1 + 2 + 2 + 2)
    assert off(changes(merged), weighted([both, LORAS[0]], [2, 1])) < EXACT


def test_weights_can_be_learned():
    def loss(weights):
        merged = jpeft.merge(algebra.cat(LORAS, weights=weights))
        return jnp.sum((merged["dense"]["kernel"] - BASE["dense"]["kernel"]) ** 2)

    found = jax.jit(jax.grad(loss))(jnp.array([0.5, 1.0, -1.0]))
    d = [changes(tree)["dense/kernel"] for tree in LORAS]
    np.testing.assert_allclose(found, [2 * np.sum(x * (0.5 * d[0] + d[1] - d[2])) for x in d], rtol=1e-4)


def test_what_comes_out_works_like_any_tree():
    merged = algebra.cat(LORAS[:2])
    x = jax.random.normal(jax.random.key(0), (4, 12))
    fn = lambda params, x: x @ params["dense"]["kernel"]
    y = jpeft.apply(fn, merged, x, allow_unused=True)
    np.testing.assert_allclose(y, fn(jpeft.merge(merged), x), rtol=1e-4, atol=1e-4)
    assert off(changes(algebra.linear([merged, LORAS[2]])), weighted(LORAS, [1, 1, 1])) < EXACT
