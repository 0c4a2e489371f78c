"""Adapters side by side: each row of a batch is what its own adapter makes of it alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.testing import shaken, subject


RANKS = [1, 3, 4, 2]
KINDS = {
    "lora": lambda p, s, n: jpeft.lora(p, rank=RANKS[n], alpha=3.0 + n, sites=s),
    "pissa": lambda p, s, n: jpeft.pissa(p, rank=RANKS[n], sites=s),
    "bottleneck": lambda p, s, n: jpeft.bottleneck(p, width=RANKS[n], scale=1.0 + n, sites=s),
    "parallel": lambda p, s, n: jpeft.bottleneck(p, width=RANKS[n], placement="parallel", sites=s),
    "ia3": lambda p, s, n: jpeft.ia3(p, sites=s),
    "experts": lambda p, s, n: jpeft.moe_lora(p, rank=RANKS[n], experts=2, sites=s),
    "mixed": lambda p, s, n: list(KINDS.values())[n](p, s, n),
    "nested": lambda p, s, n: jpeft.lora(jpeft.lora(p, rank=2, sites=s), rank=RANKS[n], sites=s),
    "parts": lambda p, s, n: jpeft.lora(p, rank=2, sites=s, targets=[".*/query/kernel", ".*/(up|down)/kernel"][n % 2]),
}


def tuned(model, kind, count=4):
    """Adapters after training: no array of theirs is zero."""
    trees = [KINDS[kind](model.params, model.sites, n) for n in range(count)]
    parts = [jpeft.partition(tree) for tree in trees]
    return [jpeft.combine(shaken(t, jax.random.key(9 + n), 0.3), f) for n, (t, f) in enumerate(parts)]


def run(model, params, adapters=None, args=None):
    return jpeft.apply(model.model, {"params": params}, *(args or model.args), adapters=adapters)


def rows(model, count):
    ids = jax.random.randint(jax.random.key(5), (count, 6), 0, 32)
    return ids, jnp.ones((count, 6), jnp.int32).at[1, 4:].set(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("scan", "base"), [(False, "float"), pytest.param(True, "nf4", marks=pytest.mark.slow)])
def test_rows_are_those_of_separate_runs(kind, scan, base):
    model = subject("decoder", scan, base)
    trees = tuned(model, kind)
    args, ids = rows(model, 7), np.array([2, 0, 3, -1, 1, 2, 0])
    found = jax.jit(lambda tree, ids: run(model, tree, ids, args))(jpeft.stack(trees), ids)
    plain = run(model, model.params, args=args)
    for row, n in enumerate(ids):
        alone = plain if n < 0 else run(model, trees[n], args=args)
        np.testing.assert_allclose(found[row], alone[row], atol=2e-5)
        assert n < 0 or np.abs(alone[row] - plain[row]).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
@pytest.mark.parametrize("scan", [False, True])
def test_weights_are_data(kind, scan):
    """Of adapters, of rows, of tokens: one trace each; zeros are the base, and one at a single place that adapter."""
    model = subject("decoder", scan)
    trees = tuned(model, kind, 3)
    tree, traces = jpeft.stack(dict(zip("abc", trees, strict=True))), []
    compiled = jax.jit(lambda weights: traces.append(weights.shape) or run(model, tree, weights))
    eye = jnp.eye(3)
    for n, alone in enumerate(trees):
        expected = run(model, alone)
        for weights in (eye[n], jnp.tile(eye[n], (2, 1)), jnp.tile(eye[n], (2, 6, 1))):
            np.testing.assert_allclose(compiled(weights), expected, atol=2e-5)
        np.testing.assert_allclose(run(model, tree, "abc"[n]), expected, atol=2e-5)
        np.testing.assert_allclose(run(model, tree, n), expected, atol=2e-5)
    np.testing.assert_allclose(compiled(jnp.zeros(3)), model.output, atol=2e-5)
    assert traces == [(3,), (2, 3), (2, 6, 3)]
    by_row = compiled(eye[jnp.array([2, 0])])
    np.testing.assert_allclose(by_row[0], run(model, trees[2])[0], atol=2e-5)
    np.testing.assert_allclose(by_row[1], run(model, trees[0])[1], atol=2e-5)


def test_weights_of_kernels_are_of_their_changes():
    """`W + sum w_n (W_n - W)`, with negative weights, too; it merges, where rows do not."""
    model = subject("decoder")
    trees = tuned(model, "lora", 3)
    weights = [0.5, -1.5, 2.0]
    changed = [jpeft.merge(tree) for tree in trees]
    total = lambda w, *ws: w + sum(g * (x - w) for g, x in zip(weights, ws, strict=True))
    expected = model.plain(jax.tree.map(total, model.params, *changed))
    np.testing.assert_allclose(run(model, jpeft.stack(trees), jnp.array(weights)), expected, atol=5e-5)
    with pytest.raises(ValueError, match="Which adapters"):
        jpeft.merge(jpeft.stack(trees))


def test_sixteen_ranks_cost_what_one_does():
    """Each row is what its own adapter makes of it, for the FLOPs of one by XLA's count; the base is there once."""
    model, x = nn.Dense(256), jax.random.normal(jax.random.key(1), (16, 32, 256))
    params = model.init(jax.random.key(0), x)["params"]
    parts = [jpeft.partition(jpeft.lora(params, rank=1 + n)) for n in range(16)]
    trees = [jpeft.combine(shaken(t, jax.random.key(n)), f) for n, (t, f) in enumerate(parts)]
    run = lambda tree, x, **how: jpeft.apply(model, {"params": tree}, x, **how)
    one = jax.jit(run).lower(trees[-1], x).compile()
    many = jax.jit(lambda tree, x, ids: run(tree, x, adapters=ids)).lower(jpeft.stack(trees), x, jnp.arange(16))
    many = many.compile()
    found = many(jpeft.stack(trees), x, jnp.arange(16))
    for n, tree in enumerate(trees):
        np.testing.assert_allclose(found[n], run(tree, x)[n], atol=1e-4)
    assert one.cost_analysis()["flops"] < many.cost_analysis()["flops"] < 1.1 * one.cost_analysis()["flops"]
    extra = many.memory_analysis().temp_size_in_bytes - one.memory_analysis().temp_size_in_bytes
    assert extra < params["kernel"].nbytes
    assert jpeft.stack(trees)["kernel"].base is params["kernel"]


def test_experts_of_a_model_have_no_rows():
    """Tokens in the order of their experts: adapters are chosen for the call as a whole, alone and in sums."""
    from jpeft.models._experts import MixtureOfExperts

    model, x = MixtureOfExperts(3, 2, 8, jax.nn.silu, True), jax.random.normal(jax.random.key(0), (2, 5, 16))
    params = model.init(jax.random.key(1), x)["params"]
    sites = jpeft.sites(model, {"params": params}, x)
    make = lambda n: jpeft.lora(params, rank=1 + n, sites=sites, targets="experts/.*")
    parts = [jpeft.partition(make(n)) for n in range(2)]
    trees = [jpeft.combine(shaken(t, jax.random.key(n), 0.3), f) for n, (t, f) in enumerate(parts)]
    run = lambda tree, adapters=None: jpeft.apply(model, {"params": tree}, x, adapters=adapters)
    both = jpeft.stack(trees)
    np.testing.assert_allclose(run(both, 1), run(trees[1]), atol=1e-5)
    expected = run(jpeft.merge(jpeft.activate(both, jnp.array([2.0, -1.0]))))
    np.testing.assert_allclose(run(both, jnp.array([2.0, -1.0])), expected, atol=1e-5)
    with pytest.raises(ValueError, match="differ by row or token"):
        run(both, np.array([0, 1]))


def test_rotations_stay_exact_in_half_precision():
    """A node that keeps some of its arrays in float32 does so in a stack."""
    import flax.linen as nn

    model, x = nn.Dense(8, dtype=jnp.bfloat16), jax.random.normal(jax.random.key(0), (2, 3, 8))
    params = model.init(jax.random.key(1), x)["params"]
    sites = jpeft.sites(model, {"params": params}, x)
    t, f = jpeft.partition(jpeft.reft(params, rank=2, positions="all", targets="", sites=sites))
    tree = jpeft.combine(shaken(t, jax.random.key(2), 0.5), f)
    run = lambda tree, adapters=None: jpeft.apply(model, {"params": tree}, x, adapters=adapters)
    np.testing.assert_array_equal(run(jpeft.stack([tree]), 0), run(tree))
