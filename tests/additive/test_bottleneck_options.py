"""The starts of bottleneck adapters, their options by pattern, their dropout, and what they refuse."""

import by_hand
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.testing import shaken, subject


def test_starts():
    """`zero`: D ~ U(+-1/sqrt(in)), U = 0; others: both normal, but of `bert` cut off at two. Every layer its own."""
    model = subject("decoder", scan=True)
    for init, bound, deviations in (
        ("zero", 0.25, (0.25 / 3**0.5, 0)),
        ("houlsby", 2e-3, (0.88e-3, 0.88e-3)),
        ("adapter_plus", 2e-2, (0.88e-2, 0.88e-2)),
        ("bert", None, (0.02, 0.02)),
    ):
        params = jpeft.bottleneck(model.params, width=64, init=init, sites=model.sites)
        for node in by_hand.adapters(params).values():
            assert node.down.shape == (2, 16, 64) and np.all(node.down[0] != node.down[1])
            assert np.all(node.down_bias == 0) and np.all(node.up_bias == 0)
            if bound is not None:
                assert 0.95 * bound < np.abs(node.down).max() <= bound
            for x, deviation in zip((node.down, node.up), deviations, strict=True):
                np.testing.assert_allclose(np.std(x), deviation, rtol=0.05)


def test_options_by_pattern():
    model = subject("decoder")
    params = jpeft.bottleneck(model.params, width={"layers_0/.*": 5, ".*": 2}, scale={".*/out": 3.0, ".*": 1.0})
    widths = {path: (node.down.shape[1], node.scale) for path, node in by_hand.adapters(params).items()}
    outs = {"layers_0/attention/out": (5, 3), "layers_1/attention/out": (2, 3)}
    assert widths == outs | {"layers_0/mlp/down": (5, 1), "layers_1/mlp/down": (2, 1)}


def test_reduction():
    """Rounded down, and no less than one."""
    model = subject("decoder")
    params = jpeft.bottleneck(model.params, reduction={"layers_0": 3, ".*": 96}, placement="block", sites=model.sites)
    assert {path: node.down.shape for path, node in by_hand.adapters(params).items()} == {
        "layers_0": (16, 5),
        "layers_1": (16, 1),
    }


class Loop(nn.Module):
    """Scanned layers, to which the scan may pass a dropout key on."""

    passes: bool

    @nn.compact
    def __call__(self, x):
        rngs = {"params": True} | ({"dropout": True} if self.passes else {})
        scan = nn.scan(
            lambda layer, x: (jnp.tanh(layer(x)), None), variable_axes={"params": 0}, split_rngs=rngs, length=3
        )
        return scan(nn.Dense(x.shape[-1], name="layers"), x)[0]


@pytest.mark.parametrize("passes", [True, False])
def test_dropout(passes):
    x, model = jax.random.normal(jax.random.key(0), (4, 8)), Loop(passes)
    params = model.init(jax.random.key(1), x)["params"]
    sites = jpeft.sites(model, {"params": params}, x)
    params = jpeft.bottleneck(params, targets="layers", dropout=0.5, init="houlsby", sites=sites)
    params = shaken(params, jax.random.key(2), 0.5)
    run = lambda **how: jpeft.apply(model, {"params": params}, x, **how)
    key = {"dropout": jax.random.key(3)}
    if passes:
        assert np.all(run(rngs=key) != run())
        np.testing.assert_array_equal(run(rngs=key), run(rngs=key))
        base = jpeft.strip(params)
        np.testing.assert_array_equal(
            jpeft.apply(model, {"params": base}, x, rngs=key), model.apply({"params": base}, x)
        )
    else:
        with pytest.raises(ValueError, match=r"'layers/bottleneck' has dropout.*split_rngs"):
            run(rngs=key)
        assert run().shape == x.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": "sequential"}, "'sequential': one of houlsby, pfeiffer, double_norm, block, parallel"),
        ({"activation": "gellu"}, "no activation 'gellu'"),
        ({"init": "ones"}, "'ones': one of zero, houlsby, adapter_plus, bert"),
        ({"width": {"layers_1/.*": 0, ".*": 2}}, "width of at least 1"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"stochastic_depth": -0.1}, "stochastic_depth=-0.1"),
        ({"width": 4, "reduction": 16}, "`width` and `reduction` both say"),
        ({"scale": "chanel"}, "`scale` is 'chanel': one of learned, channel"),
        ({"targets": ["lm_head", "layers_0/mpl"]}, "'layers_0/mpl' matches no module. Near: layers_0/mlp"),
        ({"width": {"layers_3/.*": 3, ".*": 2}}, "'layers_3/.*' matches no target of the option `width`"),
        ({"targets": ".*/mlp"}, "How many features go in and out"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.bottleneck(subject("decoder").params, **options)
