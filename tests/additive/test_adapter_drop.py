"""AdapterDrop: nodes that are gone or silent, and what it costs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.testing import LAYERS, shaken, subject


def adapted(scan=False, kind="decoder", **options):
    model = subject(kind, scan=scan)
    params = jpeft.bottleneck(model.params, width=3, sites=model.sites, **options)
    trainable, frozen = jpeft.partition(params)
    return model, jpeft.combine(shaken(trainable, jax.random.key(8), 0.5), frozen)


def by_layer(params):
    """The adapters, by layer."""
    is_adapter = lambda x: isinstance(x, jpeft.Bottleneck)
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_adapter)
    return {path[0].key for path, x in leaves if is_adapter(x)}


@pytest.mark.parametrize("placement", ["houlsby", "block", "parallel"])
@pytest.mark.parametrize("layers", range(LAYERS + 1))
def test_the_first_layers_have_none(placement, layers):
    """As if only the others had been adapted; silent ones are as good as gone."""
    model, params = adapted(placement=placement)
    gone = jpeft.adapter_drop(params, layers=layers)
    assert by_layer(gone) == {f"layers_{n}" for n in range(layers, LAYERS)}
    base = {name: x for name, x in jpeft.strip(params).items() if name in {f"layers_{n}" for n in range(layers)}}
    want = model.run({**params, **base})
    np.testing.assert_array_equal(model.run(gone), want)
    np.testing.assert_allclose(model.run(jpeft.adapter_drop(params, layers=jnp.array(layers))), want, atol=1e-6)
    assert jax.tree.structure(jpeft.adapter_drop(params, layers=LAYERS)) == jax.tree.structure(model.params)


@pytest.mark.parametrize("layers", range(LAYERS + 1))
def test_scanned_layers_are_layers_one_by_one(layers):
    model, params = adapted(scan=True)
    other, unrolled = adapted()
    for n in range(LAYERS):
        unrolled[f"layers_{n}"] = jax.tree.map(lambda x, n=n: x[n], params["layers"])
    unrolled = {**params, **{k: x for k, x in unrolled.items() if k.startswith("layers_")}}
    del unrolled["layers"]
    want = other.run(jpeft.adapter_drop(unrolled, layers=layers))
    np.testing.assert_allclose(model.run(jpeft.adapter_drop(params, layers=layers)), want, atol=1e-5)


def test_double_norms_of_an_encoder():
    """A norm whose adapter adds nothing is the norm alone."""
    model, params = adapted(kind="encoder", placement="double_norm")
    np.testing.assert_array_equal(model.run(jpeft.adapter_drop(params, layers=jnp.array(LAYERS))), model.output)


def flops(model, params):
    return jax.jit(model.__call__).lower(params).compile().cost_analysis()["flops"]


def test_computation_falls():
    """By that of a layer's adapters: four products of 12 tokens, 16 features and a width of 3, and what is added."""
    model, params = adapted()
    costs = [flops(model, jpeft.adapter_drop(params, layers=n)) for n in range(LAYERS + 1)]
    products = 2 * 2 * 2 * 12 * 16 * 3
    assert costs[LAYERS] == flops(model, model.params)
    for before, after in itertools.pairwise(costs):
        assert products < before - after < 1.6 * products


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_random_number_of_layers_is_one_trace(scan):
    """Dropped adapters have no gradients, the others some."""
    model, params = adapted(scan=scan)
    trainable, frozen = jpeft.partition(params)
    traces = 0

    @jax.jit
    def slope(trainable, layers):
        nonlocal traces
        traces += 1
        drop = lambda t: jpeft.adapter_drop(jpeft.combine(t, frozen), layers=layers)
        return jax.grad(lambda t: model.loss(drop(t)))(trainable)

    for layers in range(LAYERS + 1):
        grads = slope(trainable, jnp.array(layers))
        for n in range(LAYERS):
            own = jax.tree.map(lambda x, n=n: x[n], grads["layers"]) if scan else grads[f"layers_{n}"]
            sizes = [np.abs(x).max() for x in jax.tree.leaves(own)]
            assert (max(sizes) == 0) if n < layers else (min(sizes) > 0)
    assert traces == 1


def test_what_is_in_no_layer_stays():
    params = jpeft.invertible(jpeft.ia3(adapted()[1]))
    gone = jpeft.adapter_drop(params, layers=LAYERS)
    assert "invertible" in gone["embed"] and "ia3" in gone["layers_0"]["attention"]["key"]
    assert by_layer(gone) == set()


def test_refuses():
    model, params = adapted()
    with pytest.raises(ValueError, match=r"`jpeft\.bottleneck"):
        jpeft.adapter_drop(model.params, layers=1)
    with pytest.raises(ValueError, match="`layers` is -1"):
        jpeft.adapter_drop(params, layers=-1)
