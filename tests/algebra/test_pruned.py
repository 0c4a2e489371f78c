"""TIES, DARE and pruning by magnitude, against the same in NumPy."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tuned_trees import AXES, changes, loras, off, tuned, weighted

import jpeft
from jpeft import algebra


CLOSE = 5e-6
WEIGHTS = [0.8, -1.2, 0.6, 1.0]
TREES = [*loras(), tuned(jpeft.dora, 4, rank=2)]


def kept(d, density):
    """Every matrix with its largest entries alone."""
    found = []
    for matrix in d.reshape(-1, *d.shape[-2:]):
        order = np.argsort(-np.abs(matrix), axis=None)
        mask = np.zeros(matrix.size)
        mask[order[: int(density * matrix.size)]] = 1
        found.append(matrix * mask.reshape(matrix.shape))
    return np.reshape(found, d.shape)


def elected(changes, weights, sign):
    """The mean of the weighted changes whose sign is elected."""
    total = np.zeros(changes[0].shape)
    for place in np.ndindex(total.shape):
        entries = [d[place] for d in changes]
        ballot = sum(entries) if sign == "total" else sum(map(np.sign, entries))
        winner = 1 if ballot >= 0 else -1
        agreeing = [w * x for w, x in zip(weights, entries, strict=True) if np.sign(x) == winner]
        total[place] = np.mean(agreeing) if agreeing else 0
    return total


def by_path(one, trees=TREES):
    found = [changes(tree) for tree in trees]
    return {path: one([of[path] for of in found]) for path in AXES}


@pytest.mark.parametrize("density", [0.2, 0.55])
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_ties(density, sign):
    found = algebra.ties(TREES, density=density, weights=WEIGHTS, sign=sign)
    wanted = by_path(lambda ds: elected([kept(d, density) for d in ds], WEIGHTS, sign))
    assert off(changes(found.params), wanted) < CLOSE
    assert set(found.ranks.values()) == {None} and set(found.errors.values()) == {0.0}


def test_magnitude_prune():
    found = algebra.magnitude_prune(TREES, density=0.3, weights=WEIGHTS)
    wanted = by_path(lambda ds: sum(w * kept(d, 0.3) for w, d in zip(WEIGHTS, ds, strict=True)))
    assert off(changes(found.params), wanted) < CLOSE


def left_of(number, trees=TREES, **options):
    """What DARE leaves of the change of one tree: of the others it is as much, and counts nothing."""
    alone = [float(n == number) for n in range(len(trees))]
    return changes(algebra.dare(trees, weights=alone, **options).params)


def test_dare_keeps_entries_at_its_rate_and_scales_them_up():
    left, all_of_it = left_of(0, density=0.25), changes(TREES[0])
    kept = {path: np.abs(x) > 1e-6 for path, x in left.items()}
    for path, x in left.items():
        np.testing.assert_allclose(x[kept[path]], 4 * all_of_it[path][kept[path]], rtol=1e-3, atol=1e-5)
    entries = sum(x.size for x in kept.values())
    assert abs(sum(x.sum() for x in kept.values()) / entries - 0.25) < 5 * (0.25 * 0.75 / entries) ** 0.5
    layers = kept["layers/kernel"]
    assert (layers[0] != layers[1]).any() and (layers[1] != layers[2]).any()  # of a stack each has its own


def test_dare_is_the_sum_on_average():
    keys = jax.random.split(jax.random.key(0), 200)
    drawn = [changes(algebra.dare(TREES[:2], density=0.5, key=k).params)["dense/kernel"] for k in keys]
    wanted = weighted(TREES[:2], [1, 1])["dense/kernel"]
    deviation = np.sqrt(sum(changes(tree)["dense/kernel"] ** 2 for tree in TREES[:2]) / len(keys))  # density 1/2
    assert np.abs((np.mean(drawn, axis=0) - wanted) / deviation).max() < 5


@pytest.mark.parametrize("sign", [None, "total", "frequency"])
def test_dare_draws_for_every_tree_by_itself(sign):
    key = jax.random.key(7)
    left = [left_of(n, density=0.5, key=key) for n in range(len(TREES))]
    assert any((left[0][path] == 0).sum() and ((left[0][path] == 0) != (left[1][path] == 0)).any() for path in AXES)
    exact = [{path: np.where(np.abs(x) > 1e-6, x, 0) for path, x in of.items()} for of in left]
    found = algebra.dare(TREES, density=0.5, sign=sign, weights=WEIGHTS, key=key)
    for path, x in changes(found.params).items():
        of = [e[path] for e in exact]
        wanted = elected(of, WEIGHTS, sign) if sign else sum(w * d for w, d in zip(WEIGHTS, of, strict=True))
        np.testing.assert_allclose(x, wanted, atol=3e-5)


@pytest.mark.parametrize("method", [algebra.dare, algebra.magnitude_prune])
def test_a_density_of_one_is_the_sum(method):
    found = method(TREES, density=1.0, weights=WEIGHTS)
    assert off(changes(found.params), weighted(TREES, WEIGHTS)) < CLOSE


@settings(max_examples=5, deadline=None, derandomize=True)
@given(st.lists(st.floats(-2, 2, width=32), min_size=4, max_size=4))
def test_ties_is_linear_in_the_weights_and_blind_to_the_order(weights):
    run = lambda trees, w: changes(algebra.ties(trees, density=0.4, weights=w).params)
    found, other = run(TREES, weights), run(TREES, WEIGHTS)
    turned = [w - v for w, v in zip(weights, WEIGHTS, strict=True)][::-1]
    for path, x in run(TREES[::-1], turned).items():
        np.testing.assert_allclose(x, found[path] - other[path], atol=3e-5)


def test_ties_of_one_that_keeps_all_is_itself():
    for weight in (1.0, -2.0):
        found = algebra.ties(TREES[:1], density=1.0, weights=[weight])
        assert off(changes(found.params), weighted(TREES[:1], [weight])) < CLOSE


def test_pruned_and_of_low_rank():
    """As the sum of the whole, with the error of what the rank leaves out."""
    whole, found = (algebra.ties(TREES, density=0.5, rank=rank) for rank in (None, 3))
    d, part = changes(whole.params), changes(found.params)
    for path in AXES:
        s = np.linalg.svd(d[path], compute_uv=False)
        error = np.sqrt(np.sum(s[..., 3:] ** 2) / np.sum(s**2))
        assert found.ranks[path] == 3 and error > 0.05
        np.testing.assert_allclose(found.errors[path], error, rtol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(part[path] - d[path]) / np.linalg.norm(d[path]), error, rtol=1e-4)


@pytest.mark.parametrize("density", [0.0, 1.5, -1.0, float("nan")])
def test_densities(density):
    for method in (algebra.ties, algebra.dare, algebra.magnitude_prune):
        with pytest.raises(ValueError, match=r"A density is in \(0, 1\]"):
            method(TREES, density=density)


def test_signs():
    with pytest.raises(ValueError, match="`sign` is 'most'"):
        algebra.dare(TREES, density=0.5, sign="most")
    with pytest.raises(ValueError, match="`sign` is None"):
        algebra.ties(TREES, density=0.5, sign=None)
