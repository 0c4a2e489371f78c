"""(IA)^3: what a factor's gradient is, where factors are the same, and kernels of every kind that take them in."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.testing import shaken, subject


X = jax.random.normal(jax.random.key(0), (2, 3, 8))


def close(found, want, tolerance=1e-5):
    np.testing.assert_allclose(found, want, rtol=0, atol=tolerance * np.abs(want).max())


def test_factors_are_of_keys_values_and_what_goes_into_the_last_projection():
    is_ia3 = lambda x: isinstance(x, jpeft.IA3)
    leaves = jax.tree_util.tree_leaves_with_path(jpeft.ia3(subject("decoder").params), is_leaf=is_ia3)
    nodes = {"/".join(k.key for k in path[:-1]): x for path, x in leaves if is_ia3(x)}
    found = {path: (x.side, x.scale.shape) for path, x in nodes.items()}
    layer = {"attention/key": ("out", (8,)), "attention/value": ("out", (8,)), "mlp/down": ("in", (32,))}
    assert found == {f"layers_{n}/{path}": x for n in range(2) for path, x in layer.items()}


def test_gradient_is_the_sum_of_gradients_times_outputs():
    w, scale, g = (jax.random.normal(jax.random.key(n), s) for n, s in enumerate([(8, 5), (5,), (2, 3, 5)]))
    params = lambda scale: {"kernel": w, "ia3": jpeft.IA3(scale=scale)}
    loss = lambda scale: jnp.sum(g * jpeft.apply(nn.Dense(5, use_bias=False), {"params": params(scale)}, X))
    close(jax.grad(loss)(scale), jnp.sum(g * (X @ w), axis=(0, 1)))


def test_outputs_of_up_are_inputs_of_down():
    """In a gated block, which multiplies what `up` returns before `down` sees it."""
    model = subject("decoder")
    ups = jpeft.ia3(model.params, targets=".*/mlp/up", feedforward=None)
    downs = jpeft.ia3(model.params, targets=None)
    for n in range(2):
        scale = jax.random.normal(jax.random.key(n), (32,))
        for tree, name in ((ups, "up"), (downs, "down")):
            own = tree[f"layers_{n}"]["mlp"][name]
            own["ia3"] = own["ia3"].replace(scale=scale)
    close(model.run(ups), model.run(downs))


def test_a_small_factor_is_not_rounded_away_in_bfloat16():
    params = {"kernel": jnp.ones((8, 4), jnp.bfloat16), "ia3": jpeft.IA3(scale=jnp.full(4, 1.003))}
    x = jnp.full((1, 8), 96.0, jnp.bfloat16)  # 768 * 1.003 is 770.3, next to 768 are 764 and 772
    y = jpeft.apply(nn.Dense(4, use_bias=False, dtype=jnp.bfloat16), {"params": params}, x)
    assert y.dtype == jnp.bfloat16 and np.all(y == 772)


LAYERS = {
    "dense": (partial(nn.Dense, 6), "io"),
    "heads": (partial(nn.DenseGeneral, (2, 3)), "ioo"),
    "joined heads": (partial(nn.DenseGeneral, 6, axis=(-2, -1)), "iio"),
    "convolution": (partial(nn.Conv, 6, (3,)), "iio"),
    "einsum, outputs first": (partial(nn.Einsum, (8, 8), "...i,oi->...o", use_bias=False), "oi"),
}


class Model(nn.Module):
    """A layer named `layer`."""

    layer: Callable

    @nn.compact
    def __call__(self, x):
        return self.layer(name="layer")(x)


@pytest.mark.parametrize("side", ["out", "in"])
@pytest.mark.parametrize("name", LAYERS)
def test_kernels_take_factors_in(name, side):
    """`sites` tells what their axes are."""
    layer, axes = LAYERS[name]
    model, x = Model(layer), X.reshape(2, 3, 4, 2) if name == "joined heads" else X
    params = shaken(model.init(jax.random.key(1), x)["params"], jax.random.key(2))
    sites = jpeft.sites(model, {"params": params}, x)
    targets = {"targets": "layer", "feedforward": None} if side == "out" else {"targets": None, "feedforward": "layer"}
    tuned = jpeft.ia3(params, sites=sites, **targets)
    assert tuned["layer"]["ia3"].axes == axes
    tuned["layer"]["ia3"] = shaken(tuned["layer"]["ia3"], jax.random.key(3), 0.5)
    y = jpeft.apply(model, {"params": tuned}, x)
    assert np.abs(y - model.apply({"params": params}, x)).max() > 0.1
    close(model.apply({"params": jpeft.merge(tuned)}, x), y)


def test_nodes_are_folded_in_their_order():
    """Around one another, and over a kernel that is itself a node."""
    model = Model(partial(nn.Dense, 6))
    params = shaken(model.init(jax.random.key(1), X)["params"], jax.random.key(2))
    method = jpeft.chain(
        jpeft.nf4(), jpeft.lora(rank=2), jpeft.beft(targets="layer"), jpeft.ia3(targets="layer", feedforward="layer")
    )
    trainable, frozen = jpeft.partition(method(params))
    tuned = jpeft.combine(shaken(trainable, jax.random.key(3), 0.5), frozen)
    assert set(tuned["layer"]) == {"kernel", "bias", "beft", "ia3_1", "ia3_2"}
    close(model.apply({"params": jpeft.merge(tuned)}, X), jpeft.apply(model, {"params": tuned}, X))


def test_merge_says_what_cannot_take_a_node_in():
    params = {
        "norm": {"scale": jnp.ones(4), "ia3": jpeft.IA3(scale=jnp.ones(4))},
        "heads": {"kernel": jnp.ones((4, 2, 3)), "ia3": jpeft.IA3(scale=jnp.ones(3))},
        "plain": {"kernel": jnp.ones((4, 3)), "beft": jpeft.BEFT(bias=jnp.ones(3))},
    }
    params["plain"] = jpeft.bottleneck(params["plain"], targets="", width=1)
    with pytest.raises(ValueError, match="cannot be merged") as e:
        jpeft.merge(params)
    assert str(e.value).split("\n")[1:] == [
        "  norm/ia3: IA3, whose module has no kernel and bias alone, but ['scale']",
        "  heads/ia3: IA3, whose kernel of shape (4, 2, 3) cannot have the axes 'io'",
        "  plain/beft: BEFT, whose module has no bias to take it in",
        "  plain/bottleneck_1: Bottleneck, which acts on activations: it is no function of the weights",
    ]


def test_refuses():
    with pytest.raises(ValueError, match="nothing to scale"):
        jpeft.ia3(subject("decoder").params, targets=None, feedforward=None)
    with pytest.raises(ValueError, match="matches no module"):
        jpeft.ia3({"head": {"kernel": jnp.ones((4, 3))}})
