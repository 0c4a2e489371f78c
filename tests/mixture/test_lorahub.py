"""LoRAHub: what it composes, and that it finds what is there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_arrow import TREES, tree
from test_moe_lora import DENSE, PARAMS, X, close

import jpeft
from jpeft.testing import subject


@jax.jit
def output(params):
    return jpeft.apply(DENSE, {"params": params}, X)


def composed(trees, weights):
    """A = sum w A, B = sum w B."""
    nodes = [t["kernel"] for t in trees]
    total = lambda name: sum(w * getattr(x, name) for w, x in zip(weights, nodes, strict=True))
    return {**trees[0], "kernel": nodes[0].replace(a=total("a"), b=total("b"))}


def fixed(weights):
    """An optimizer that knows."""
    return lambda score, start, budget: np.asarray(weights)


def test_a_planted_composition_is_found():
    """Up to the sign of all weights, which changes nothing."""
    trees, planted = [tree(n) for n in range(3)], np.array([0.6, 0.1, 0.3])
    wanted, calls = output(composed(trees, planted)), []

    def loss(params):
        calls.append(params)
        return jnp.mean((output(params) - wanted) ** 2)

    params, weights = jpeft.lorahub(trees, loss, budget=400, penalty=0.0)
    assert len(calls) == 400 and output._cache_size() <= 2
    np.testing.assert_allclose(np.sign(weights[0]) * weights, planted, atol=0.02)
    np.testing.assert_allclose(output(params), wanted, atol=0.02)
    start = {**trees[0], "kernel": trees[0]["kernel"].replace(b=jnp.zeros_like(trees[0]["kernel"].b))}
    assert loss(params) < 1e-3 * loss(start)


@pytest.mark.parametrize("weights", [[0, 1, 0], [0.5, -1, 1.5]])
def test_composition(weights):
    """One-hot weights are the member itself."""
    trees = [tree(n) for n in range(3)]
    params, found = jpeft.lorahub(trees, lambda p: 0.0, minimize=fixed(weights))
    assert found.tolist() == weights and jax.tree.structure(params) == jax.tree.structure(trees[0])
    want = trees[1] if sum(map(abs, weights)) == 1 else composed(trees, weights)
    close((params["kernel"].a, params["kernel"].b), (want["kernel"].a, want["kernel"].b))


def test_other_ranks_and_scales():
    for n, one in enumerate(TREES):
        params, _ = jpeft.lorahub(TREES, lambda p: 0.0, minimize=fixed(np.eye(4)[n]))
        assert params["kernel"].a.shape == (6, 4)
        close(output(params), output(one))


def test_scanned_layers_on_a_quantized_base():
    model = subject(scan=True, base="nf4")
    trees = [tree(n, model.params, targets=".*/value/kernel", sites=model.sites) for n in range(2)]
    params, _ = jpeft.lorahub(trees, lambda p: 0.0, minimize=fixed([0, 1]))
    np.testing.assert_allclose(model.run(params), model.run(trees[1]), atol=1e-5)


def test_the_score():
    """The loss, and the penalty on the mean size of the weights."""
    scores = []
    minimize = lambda score, start, budget: scores.append((score(np.array([1.0, -0.5])), start, budget)) or start
    jpeft.lorahub([tree(0), tree(1)], lambda p: jnp.sum(p["kernel"].a), budget=7, penalty=0.2, minimize=minimize)
    ((score, start, budget),) = scores
    want = float(jnp.sum(tree(0)["kernel"].a - 0.5 * tree(1)["kernel"].a)) + 0.2 * 0.75
    np.testing.assert_allclose(score, want, rtol=1e-5)
    assert start.tolist() == [0, 0] and budget == 7


def test_weights_stay_within_the_bound():
    far = lambda params: -jnp.sum(jnp.abs(params["kernel"].a))
    _, weights = jpeft.lorahub([tree(0), tree(1)], far, budget=60, bound=0.7)
    assert np.abs(weights).max() == 0.7
    _, weights = jpeft.lorahub([tree(0), tree(1)], far, minimize=fixed([9, -9]))
    assert weights.tolist() == [1.5, -1.5]


def test_what_is_no_number_is_not_taken():
    away = lambda params: jnp.where(jnp.any(params["kernel"].a != 0), jnp.nan, 1.0)
    _, weights = jpeft.lorahub([tree(0), tree(1)], away, budget=10)
    assert weights.tolist() == [0, 0]


def test_the_key_settles_the_steps():
    loss = lambda params: jnp.mean((output(params) - 1) ** 2)
    find = lambda seed: jpeft.lorahub([tree(0), tree(1)], loss, budget=10, key=jax.random.key(seed))[1].tolist()
    assert find(1) == find(1) != find(2)


def test_faults():
    with pytest.raises(ValueError, match="`budget` is 0"):
        jpeft.lorahub(TREES, lambda p: 0.0, budget=0)
    with pytest.raises(ValueError, match="kernel"):
        jpeft.lorahub([TREES[0], PARAMS], lambda p: 0.0)
