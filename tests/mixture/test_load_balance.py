"""The loss that keeps experts busy, against its formula and where it is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_moe_lora import DENSE, PARAMS, X, of_dense, trained

import jpeft
from jpeft.testing import LAYERS, subject


def by_formula(node, x, top, counted):
    """E sum_e f_e P_e over the tokens that count."""
    rows = np.asarray(x.reshape(-1, x.shape[-1]))[counted]
    scores = np.exp(rows @ np.asarray(node.router))
    shares = scores / scores.sum(-1, keepdims=True)
    chosen = np.zeros_like(shares)
    np.put_along_axis(chosen, np.argsort(-shares, -1)[:, :top], 1 / top, -1)
    return shares.shape[-1] * np.sum(chosen.mean(0) * shares.mean(0))


@pytest.mark.parametrize("top", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_formula(top, masked):
    params, mask = of_dense(top=top), jnp.ones((2, 5), jnp.int32).at[1, 2:].set(0)
    counted = np.asarray(mask).ravel() > 0 if masked else slice(None)
    run = jax.jit(lambda p: jpeft.load_balance(DENSE, {"params": p}, X, mask=mask if masked else None))
    y, loss = run(params)
    np.testing.assert_allclose(y, jpeft.apply(DENSE, {"params": params}, X), rtol=1e-6)
    np.testing.assert_allclose(loss, by_formula(params["moe_lora"], X, top, counted), rtol=1e-5)
    assert loss > 1.01


def routed(router, top=1):
    params = jpeft.moe_lora(PARAMS, rank=2, experts=3, top=top)
    return {**params, "moe_lora": params["moe_lora"].replace(router=router)}


def test_extremes():
    """1 where experts have equal parts, E where one has it all."""
    x = jnp.tile(jnp.eye(6)[:3], (2, 1))[None]  # a token for each expert, twice
    even = routed(50 * jnp.eye(6)[:, :3])
    np.testing.assert_allclose(jpeft.load_balance(DENSE, {"params": even}, x)[1], 1, rtol=1e-5)
    one = routed(jnp.zeros((6, 3)).at[:, 1].set(50))
    np.testing.assert_allclose(jpeft.load_balance(DENSE, {"params": one}, x)[1], 3, rtol=1e-5)
    every = routed(jnp.zeros((6, 3)).at[:, 1].set(50), top=None)  # there is nothing to spread
    np.testing.assert_allclose(jpeft.load_balance(DENSE, {"params": every}, x)[1], 1, rtol=1e-5)


def test_descent_spreads_the_tokens():
    """The router that sends all tokens to one expert learns to use three, by this loss alone."""
    router = jnp.zeros((6, 3)).at[0, 1].set(1.0)
    x = X.at[..., 0].set(1.0)
    loss = lambda router: jpeft.load_balance(DENSE, {"params": routed(router)}, x)[1]
    step = jax.jit(lambda r: r - jax.grad(loss)(r))
    assert loss(router) > 1.5
    for _ in range(100):
        router = step(router)
    assert np.bincount(np.argmax(x @ router, -1).ravel()).min() >= 2
    assert loss(router) < 1.05


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layers_are_unrolled_ones(remat):
    """The mean over all layers, of both the value and the gradient."""
    scanned, plain = subject(scan=True), subject(scan=False)
    targets = ".*/(value|down)/kernel"
    make = lambda s: jpeft.moe_lora(s.params, rank=2, experts=3, top=2, targets=targets, sites=s.sites)
    stacked = trained(make(scanned))
    layers = [jax.tree.map(lambda x, n=n: x[n], stacked["layers"]) for n in range(LAYERS)]
    unrolled = {**plain.params, **make(plain)}
    for n in range(LAYERS):
        like = jax.tree.structure(unrolled[f"layers_{n}"])
        unrolled[f"layers_{n}"] = jax.tree.unflatten(like, jax.tree.leaves(layers[n]))
    unrolled |= {name: stacked[name] for name in ("embed", "norm", "lm_head")}

    def loss(subject, params):
        model = dataclasses.replace(subject.model, remat=remat, parent=None)
        return jpeft.load_balance(model, {"params": params}, *subject.args, mask=subject.args[1])[1]

    def router_slope(subject, params):
        trainable, frozen = jpeft.partition(params)
        value, grads = jax.jit(jax.value_and_grad(lambda t: loss(subject, jpeft.combine(t, frozen))))(trainable)
        is_moe = lambda x: isinstance(x, jpeft.MoELoRA)
        return value, [x.router for x in jax.tree.leaves(grads, is_leaf=is_moe) if is_moe(x)]

    value, slopes = router_slope(scanned, stacked)
    want, expected = router_slope(plain, unrolled)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for k, g in enumerate(slopes):
        one_by_one = jnp.stack(expected[k :: len(slopes)])
        assert np.abs(g).max() > 1e-6
        np.testing.assert_allclose(g, one_by_one, rtol=0, atol=1e-4 * np.abs(g).max())


def test_faults():
    with pytest.raises(ValueError, match=r"no MoELoRA.*jpeft\.moe_lora"):
        jpeft.load_balance(DENSE, {"params": PARAMS}, X)
    with pytest.raises(ValueError, match=r"mask is \(2, 4\).* 10 tokens"):
        jpeft.load_balance(DENSE, {"params": of_dense(top=1)}, X, mask=jnp.ones((2, 4)))
