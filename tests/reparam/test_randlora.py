"""What is known of RandLoRA in closed form: its sum, its full rank, and the one pair of random arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

import jpeft


WEIGHTS = {"down": normal(0, 12, 5), "square": normal(1, 5, 5), "up": normal(2, 5, 9)}


def model(params, x):
    return jnp.tanh(jnp.tanh(x @ params["down"]) @ params["square"]) @ params["up"]


def tuned(weights=WEIGHTS, **options):
    """RandLoRA with random lambda and gamma."""
    trainable, frozen = jpeft.partition(jpeft.randlora(weights, targets=".*", **{"rank": 2, **options}))
    return jpeft.combine(jax.tree.map(lambda x: x + normal(3, *x.shape), trainable), frozen)


def test_sum_of_terms():
    """P is at the narrow side, which is the inputs' where both are one; every kernel takes its part of the pair."""
    params = tuned(alpha=3)
    p, q = params["jpeft_shared"]["randlora_narrow"], params["jpeft_shared"]["randlora_wide"]
    assert (p.shape, q.shape) == ((2, 5), (3, 12, 2))
    for name, w in WEIGHTS.items():
        node, (narrow, wide) = params[name], sorted(w.shape)
        terms = [
            q[k, :wide] @ jnp.diag(node.inner[k]) @ p[:, :narrow] @ jnp.diag(node.outer[k])
            for k in range(-(-narrow // 2))
        ]
        assert len(node.inner) == len(terms)
        change = sum(terms) if name == "down" else sum(terms).T
        np.testing.assert_allclose(jpeft.merge(params)[name], w + 1.5 * change, rtol=1e-4, atol=1e-4)
    x = normal(4, 3, 12)
    np.testing.assert_allclose(jpeft.apply(model, params, x), model(jpeft.merge(params), x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rank", [1, 3, 4, 16])
def test_full_rank(rank):
    """Whether the rank divides the narrow side or not, and if it is larger."""
    params = tuned({"w": jnp.zeros((24, 16))}, rank=rank)
    assert np.linalg.matrix_rank(jpeft.merge(params)["w"], rtol=1e-5) == 16


def test_sparse_leaves_out_what_no_row_of_p_has():
    """Those outputs never change, and the rank is not full."""
    params = tuned({"w": jnp.zeros((24, 16))}, rank=2, sparsity=4)
    left_out = np.all(params["jpeft_shared"]["randlora_narrow"] == 0, axis=0)
    assert 0 < left_out.sum() < 16
    np.testing.assert_array_equal(np.all(jpeft.merge(params)["w"] == 0, axis=0), left_out)


def test_start():
    """W' = W with lambda = 0, which has a gradient; the pair is of variance one and does not train."""
    params = jpeft.randlora({"w": normal(5, 300, 200)}, rank=50, targets="w")
    node = params["w"]
    np.testing.assert_array_equal(jpeft.merge(params)["w"], node.base)
    np.testing.assert_allclose(node.outer, jnp.full((4, 200), 1 / 200))
    assert node.scale == 640 / 50
    trainable, frozen = jpeft.partition(params)
    assert jax.tree.leaves(trainable["jpeft_shared"]) == []
    for x in params["jpeft_shared"].values():
        np.testing.assert_allclose([np.mean(x), np.std(x), np.abs(x).max()], [0, 1, 3**0.5], atol=0.02)
    loss = lambda t: jnp.sum(jpeft.apply(lambda p, x: x @ p["w"], jpeft.combine(t, frozen), jnp.ones((1, 300))) ** 2)
    gradient = jax.grad(loss)(trainable)["w"]
    assert np.all(gradient.inner != 0) and np.all(gradient.outer == 0)


@pytest.mark.parametrize("sparsity", [1, 3, 14.1])
def test_sparse(sparsity):
    """One entry in so many, of both signs alike, and of variance one together."""
    shared = jpeft.randlora({"w": normal(5, 400, 200)}, rank=50, sparsity=sparsity, targets="w")["jpeft_shared"]
    for x in shared.values():
        np.testing.assert_allclose(np.unique(np.abs(x)), [0, sparsity**0.5][sparsity == 1 :], rtol=1e-6)
        np.testing.assert_allclose(np.mean(x != 0) * sparsity, 1, rtol=0.1)
        np.testing.assert_allclose([np.mean(x), np.var(x)], [0, 1], atol=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank of at least 1"),
        ({"dropout": 1.0}, "dropout in"),
        ({"sparsity": 0.5}, "at least 1, not 0.5"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        tuned(**options)


def test_what_is_kept_for_the_backward_pass():
    """The random arrays and what trains, but not the factors that they make: those are as large as the kernel each."""
    params = jpeft.randlora({"w": normal(0, 64, 64)}, rank=4, targets="w")
    trainable, frozen = jpeft.partition(params)
    fn = lambda params: normal(1, 2, 64) @ params["w"]
    run = lambda trainable: jpeft.apply(fn, jpeft.combine(trainable, frozen))
    kept = jax.tree.leaves(jax.vjp(run, trainable)[1])
    assert sum(x.size for x in kept) < 1.5 * sum(x.size for x in params["jpeft_shared"].values()) < 2 * 64 * 64
