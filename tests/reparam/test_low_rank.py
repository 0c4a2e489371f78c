"""Terms of low rank wherever a kernel is used: by experts, in a table, in a convolution, and in half precision."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

import jpeft


METHODS = {
    "lora_fa": jpeft.lora(rank=2, freeze_a=True),
    "moslora": jpeft.moslora(rank=2),
    "lora_xs": jpeft.lora_xs(rank=2),
    "tinylora": jpeft.tinylora(length=5),
    "tinylora_shared": jpeft.tinylora(length=5, group="one"),
    "vblora": jpeft.vblora(rank=2, vectors=5, length=2),
    "delora": jpeft.delora(rank=2),
    "gralora": jpeft.gralora(rank=2),
    "randlora": jpeft.randlora(rank=2, alpha=2),
}
USES = {
    "experts": (lambda w, x: jax.lax.ragged_dot(x, w, jnp.array([2, 0, 3])), (3, 8, 6), "sio", normal(4, 5, 8)),
    "table": (lambda w, x: w[x], (8, 6), "io", jnp.array([[1, 7], [3, 1]])),
    "transposed": (lambda w, x: x @ w.T, (6, 8), "oi", normal(4, 5, 8)),
}


def tuned(method, params, **how):
    """A method with random trainable arrays."""
    trainable, frozen = jpeft.partition(METHODS[method](params, **how))
    return jpeft.combine(jax.tree.map(lambda x: x + normal(2, *x.shape).astype(x.dtype), trainable), frozen)


def by_branch(method):
    """GraLoRA cuts activations into pieces, which what stands for them elsewhere cannot be."""
    return "merged" if method == "gralora" else "branched"


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("method", METHODS)
def test_uses(method, use):
    fn, shape, axes, x = USES[use]
    params = tuned(method, {"w": normal(0, *shape)}, targets={"w": axes})
    run = lambda params, x: fn(params["w"], x)
    want = "branched" if use == "transposed" else by_branch(method)
    assert set(jpeft.coverage(run, params, x).values()) == {want}
    merged = jpeft.merge(params)
    assert np.abs(merged["w"] - normal(0, *shape)).max() > 0.01
    np.testing.assert_allclose(jpeft.apply(run, params, x), run(merged, x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_convolution(method):
    model, x = nn.Conv(6, (3, 2)), normal(1, 2, 5, 4, 4)
    base = model.init(jax.random.key(0), x)["params"]
    sites = jpeft.sites(model, {"params": base}, x)
    params = tuned(method, base, targets="kernel", sites=sites)
    assert set(jpeft.coverage(model, {"params": params}, x).values()) == {by_branch(method)}
    found = jpeft.apply(model, {"params": params}, x)
    np.testing.assert_allclose(found, model.apply({"params": jpeft.merge(params)}, x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_dropout_is_of_the_term_alone(method):
    """The mean of many calls is the call without a key, and the base's product is that of the whole input."""
    w, x, key = normal(0, 8, 6), jnp.ones((4000, 8)), jax.random.key(5)
    params = tuned(method, {"w": w}, targets="w", dropout=0.5)
    run = lambda params, **how: jpeft.apply(lambda params, x: x @ params["w"], params, x, **how)
    dropped, plain = run(params, rngs=key), run(params)
    spread = np.std(dropped, axis=0)
    assert np.all(spread > 0.01)
    np.testing.assert_allclose((dropped.mean(axis=0) - plain[0]) / spread, np.zeros(6), atol=0.1)
    other = params | {"w": params["w"].replace(base=w + 1)}
    np.testing.assert_allclose(run(other, rngs=key), dropped + 8, rtol=1e-4, atol=1e-2)
