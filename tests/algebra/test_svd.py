"""The nearest adapter of a rank: how near it is, and that the sum need not be formed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tuned_trees import AXES, BASE, changes, loras, off, tuned, weighted

import jpeft
from jpeft import algebra
from jpeft.algebra._combine import _of_one_path
from jpeft.algebra._rule import Rule


LORAS = loras()
MIXED = [tuned(jpeft.dora, 4, rank=2), tuned(jpeft.loha, 5, rank=2, size=0.5)]
CASES = {"factors": LORAS, "dense": [*MIXED, LORAS[1]]}


def nearest(d, rank):
    """The part of rank `rank` of every matrix, and the relative error of all of them, in float64."""
    u, s, v = np.linalg.svd(d, full_matrices=False)
    part = (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]
    return part, np.sqrt(np.sum(s[..., rank:] ** 2) / np.sum(s**2))


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=4, deadline=None, derandomize=True)
@given(weights=st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3), rank=st.sampled_from([1, 3]))
def test_no_other_is_nearer(case, weights, rank):
    """Eckart and Young: the error is the tail of the singular values, and the same is left out."""
    trees = CASES[case]
    found = algebra.svd(trees, weights=weights, rank=rank)
    for path, d in weighted(trees, weights).items():
        part, error = nearest(d, rank) if np.linalg.norm(d) else (d, 0.0)
        np.testing.assert_allclose(found.errors[path], error, rtol=1e-4, atol=1e-5)
        at = np.linalg.norm(changes(found.params)[path] - d)
        np.testing.assert_allclose(at, np.linalg.norm(part - d), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_with_all_singular_values_it_is_exact(case):
    found = algebra.svd(CASES[case], rank=64)
    assert off(changes(found.params), weighted(CASES[case], [1, 1, 1])) < 3e-6
    assert max(found.errors.values()) < 1e-6
    full = {"dense/kernel": 10, "heads/kernel": 6, "layers/kernel": 7, "conv/kernel": 9}
    terms = {"dense/kernel": 6, "heads/kernel": 5, "layers/kernel": 6, "conv/kernel": 5}
    assert found.ranks == (terms if case == "factors" else full)


def test_ranks_by_pattern():
    found = algebra.svd(LORAS, rank={"layers/.*": 2, ".*": 4})
    assert found.ranks == {path: 2 if path == "layers/kernel" else 4 for path in AXES}
    assert found.params["layers"]["kernel"].b.shape == (3, 2, 8)
    with pytest.raises(ValueError, match="matches no target of the option `rank`"):
        algebra.svd(LORAS, rank={"lyers/.*": 2, ".*": 4})


def test_nothing_has_no_error():
    found = algebra.svd([LORAS[0], LORAS[0]], weights=[0.0, 0.0], rank=2)
    assert set(found.errors.values()) == {0.0}
    jax.tree.map(np.testing.assert_array_equal, jpeft.merge(found.params), BASE)


def test_the_change_of_a_vector_stays_whole():
    tree = tuned(jpeft.delta, 6, targets=["dense/bias", "dense/kernel"])
    found = algebra.svd([tree, LORAS[0]], weights=[2, 1], rank=2)
    assert found.ranks["dense/bias"] is None and found.errors["dense/bias"] == 0
    np.testing.assert_allclose(found.params["dense"]["bias"].values, 2 * tree["dense"]["bias"].values, rtol=1e-6)


def stack(count, method, **options):
    """The node of a stack of `count` matrices of 64 times 48."""
    params = {"kernel": jax.random.normal(jax.random.key(0), (count, 64, 48))}
    return tuned(method, 1, on=params, targets={"kernel": "sio"}, **options)["kernel"]


@pytest.mark.parametrize("method", [jpeft.lora, jpeft.dora])
def test_memory_is_that_of_a_matrix(method):
    """Beside the base, of a stack of 64 matrices no array of their size is made, and the program is no longer."""
    matrix = 64 * 48 * 4
    extra = {}
    for count in (4, 64):
        nodes, weights = [stack(count, method, rank=2)] * 2, jnp.ones(2)
        lowered = _of_one_path.lower(nodes, weights, jax.random.key(0), rule=Rule(), rank=2)
        extra[count] = lowered.compile().memory_analysis().temp_size_in_bytes
    factors = 60 * 2 * 2 * (64 + 48) * 4  # of 60 matrices more
    assert extra[64] - extra[4] < factors + 2 * matrix


def test_compiled_once_for_a_shape():
    params = {f"layers_{n}": {"kernel": jax.random.normal(jax.random.key(n), (6, 5))} for n in range(5)}
    trees = [tuned(jpeft.lora, n, on=params, targets=".*kernel", rank=2) for n in (1, 2)]
    before = _of_one_path._cache_size()
    for weights in ([1, 1], [0.5, -1]):
        algebra.svd(trees, weights=weights, rank=2)
    assert _of_one_path._cache_size() == before + 1
