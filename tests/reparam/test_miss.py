"""MiSS is LoRA with a fixed A, also where its rows do not divide the inputs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft


X, W = jax.random.normal(jax.random.key(0), (3, 4, 11)), jax.random.normal(jax.random.key(1), (11, 6))


def close(found, want):
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize(("rank", "repeats"), [(1, 1), (4, 1), (4, 3), (11, 2)])
def test_lora_with_repeated_identities(rank, repeats):
    d = jax.random.normal(jax.random.key(2), (rank, 6 // repeats))
    a = jnp.tile(jnp.eye(rank), (11, 1))[:11]
    lora = jpeft.LoRA(base=W, a=a, b=jnp.tile(d, (1, repeats)), scale=1.0)
    miss = jpeft.MiSS(base=W, d=d, repeats=repeats)
    run = lambda node: jpeft.apply(nn.Dense(6, use_bias=False), {"params": {"kernel": node}}, X)
    close(run(miss), run(lora))
    close(miss.value(), lora.value())
    assert np.linalg.matrix_rank(miss.value() - W, tol=1e-4) <= rank


def test_a_lookup_takes_the_value():
    table = {"embedding": jpeft.MiSS(base=W, d=jnp.ones((4, 6)))}
    ids = jnp.array([[0, 10, 4]])
    assert jpeft.coverage(nn.Embed(11, 6), {"params": table}, ids)["embedding"] == "merged"
    close(jpeft.apply(nn.Embed(11, 6), {"params": table}, ids), W[ids] + 1)


def test_dropout():
    params = {"kernel": jpeft.MiSS(base=jnp.zeros((4, 1)), d=jnp.ones((2, 1)), dropout=0.5)}
    run = lambda **how: jpeft.apply(nn.Dense(1, use_bias=False), {"params": params}, jnp.ones((500, 4)), **how)
    np.testing.assert_array_equal(run(), np.full((500, 1), 4))
    found = run(rngs={"dropout": jax.random.key(0)})
    assert set(np.unique(found)) == {0, 2, 4, 6, 8}
    np.testing.assert_allclose(np.mean(found), 4, atol=0.3)


@pytest.mark.parametrize("options", [{"rank": 12}, {"rank": 0}, {"rank": 4, "width": 4}, {"rank": 4, "dropout": 1.0}])
def test_refuses(options):
    with pytest.raises(ValueError, match=r"MiSS of a kernel \(11, 6\) needs"):
        jpeft.miss({"kernel": W}, **options)
