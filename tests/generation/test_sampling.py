import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jpeft.generation._sampling import Sampling, choose, min_p, process, top_k, top_p


FILE = np.load(Path(__file__).parents[1] / "fixtures/sampling/scores.npz")
CASES = json.loads(str(FILE["cases"]))


def seen(ids, mask, vocabulary):
    found = np.zeros((len(ids), vocabulary), bool)
    for row, (tokens, kept) in enumerate(zip(ids, mask, strict=True)):
        found[row, tokens[kept]] = True
    return jnp.asarray(found)


@pytest.mark.parametrize("n", range(len(CASES)), ids=lambda n: json.dumps(CASES[n]))
def test_scores_are_those_of_transformers(n):
    scores = jnp.asarray(FILE["scores"])
    sampling = Sampling(**{"temperature": 1.0, **CASES[n]})
    got = process(scores, seen(FILE["ids"], FILE["mask"], scores.shape[1]), sampling)
    want = FILE["processed"][n]
    ties = 1  # the row of equal scores: torch does not say which of them it sorts first
    np.testing.assert_allclose(np.sort(got[ties]), np.sort(want[ties]), rtol=1e-6)
    np.testing.assert_allclose(np.delete(got, ties, axis=0), np.delete(want, ties, axis=0), rtol=1e-6)


scores = arrays(np.float32, (3, 11), elements=st.floats(-20, 20, width=32, allow_subnormal=False))


@settings(deadline=None)  # compilation
@given(scores, st.integers(1, 15))
def test_top_k_keeps_k_and_their_equals(scores, k):
    kept = np.isfinite(top_k(jnp.asarray(scores), k))
    for row, mine in zip(scores, kept, strict=True):
        assert mine.sum() >= min(k, len(row))
        assert mine.sum() - (row == row[mine].min()).sum() < k


@settings(deadline=None)  # compilation
@given(scores, st.floats(0.01, 1.0))
def test_top_p_keeps_no_more_than_needed(scores, p):
    probabilities = np.asarray(jax.nn.softmax(jnp.asarray(scores)), np.float64)
    kept = np.isfinite(top_p(jnp.asarray(scores), p))
    for row, mine in zip(probabilities, kept, strict=True):
        assert row[mine].sum() >= p - 1e-5
        assert row[mine].sum() - row[mine].min() <= p + 1e-5


@settings(deadline=None)  # compilation
@given(scores, st.floats(0.0, 1.0))
def test_every_filter_keeps_the_most_probable(scores, p):
    best = scores == scores.max(axis=1, keepdims=True)
    for kept in (top_k(jnp.asarray(scores), 1), min_p(jnp.asarray(scores), p)):
        assert np.all(np.isfinite(kept)[best])
    assert np.all(np.any(np.isfinite(top_p(jnp.asarray(scores), max(p, 1e-3))) & best, axis=1))


def test_chance_follows_the_probabilities():
    row = jnp.log(jnp.array([0.5, 0.25, 0.15, 0.1]))
    drawn = choose(jnp.broadcast_to(row, (20000, 4)), None, Sampling(temperature=1.0, top_k=3), jax.random.key(0))
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    np.testing.assert_allclose(shares, [5 / 9, 2.5 / 9, 1.5 / 9, 0], atol=0.012)  # three standard deviations


def test_without_temperature_the_highest_is_chosen_after_the_penalty():
    scores = jnp.array([[3.0, 2.9, 1.0], [-3.0, -1.0, -1.05]])
    seen = jnp.array([[True, False, False], [False, True, False]])
    assert choose(scores, seen, Sampling(repetition_penalty=1.1), jax.random.key(0)).tolist() == [1, 2]
    assert choose(scores, seen, Sampling(), jax.random.key(0)).tolist() == [0, 1]
