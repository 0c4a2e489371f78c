"""LoRA against Hugging Face's PEFT on torch modules: outputs, merged weights, and gradients of A and B."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft


ARRAYS = dict(np.load(Path(__file__).parents[1] / "fixtures" / "lora" / "peft.npz"))
CASES = {
    "linear": ([nn.Dense(5)], {"rank": 2, "alpha": 6}),
    "rslora": ([nn.Dense(8, use_bias=False)], {"rank": 4, "alpha": 6, "rslora": True}),
    "embedding": ([nn.Embed(11, 6)], {"rank": 3, "alpha": 4}),
    "conv1d": ([nn.Conv(4, (3,), padding=1)], {"rank": 2, "alpha": 5}),
    "conv2d": (
        [nn.Conv(4, (3, 2), strides=(2, 1), padding=((1, 1), (0, 0)))],
        {"rank": 3, "alpha": 2, "rslora": True},
    ),
    "patterns": (
        [nn.Dense(8), nn.relu, nn.Dense(4)],
        {"rank": {"layers_2/.*": 4, ".*": 2}, "alpha": {"layers_2/.*": 6, ".*": 3}},
    ),
}


def kernel(x):
    """A torch weight `(out, in, *window)` as a kernel `(*window, in, out)`."""
    return jnp.asarray(np.transpose(x, (*range(2, x.ndim), 1, 0)))


def factor(x):
    """A torch factor, `(rank, in, *window)` or `(out, rank, ...)`, as a matrix `(in, rank)` or `(rank, out)`."""
    return kernel(x).reshape(-1, x.shape[0])


def channels_last(name, x):
    return jnp.moveaxis(x, 1, -1) if name.startswith("conv") else jnp.asarray(x)


def of_torch(name):
    """The input, the layers' arrays by the path of their kernel, and the base parameters."""
    arrays = {key.removeprefix(f"{name}/"): x for key, x in ARRAYS.items() if key.startswith(f"{name}/")}
    layers, params = {}, {}
    for n in sorted({key[0] for key in arrays if "/" in key}):
        layer = layers[f"layers_{n}"] = {key[2:]: x for key, x in arrays.items() if key.startswith(f"{n}/")}
        here = params[f"layers_{n}"] = {}
        if name == "embedding":
            here["embedding"] = jnp.asarray(layer["weight"])
            layer["merged"] = layer["merged"].T
        else:
            here["kernel"] = kernel(layer["weight"])
        if "bias" in layer:
            here["bias"] = jnp.asarray(layer["bias"])
    return channels_last(name, arrays["x"]), channels_last(name, arrays["y"]), layers, params


@pytest.fixture(params=CASES)
def case(request):
    """A model, its parameters with torch's A and B in the nodes, input and output, and torch's arrays by layer."""
    name = request.param
    layers, options = CASES[name]
    model = nn.Sequential(layers)
    x, y, arrays, params = of_torch(name)
    sites = jpeft.sites(model, {"params": params}, x)
    params = jpeft.lora(params, targets=".*(kernel|embedding)", sites=sites, **options)
    for layer, own in arrays.items():
        (weight,) = (k for k in params[layer] if k != "bias")
        node = params[layer][weight]
        a, b = factor(own["a"]), factor(own["b"])
        assert (node.a.shape, node.b.shape) == (a.shape, b.shape)
        params[layer][weight] = node.replace(a=a, b=b)
    return model, params, x, y, arrays


def test_outputs(case):
    model, params, x, y, _ = case
    np.testing.assert_allclose(jpeft.apply(model, {"params": params}, x), y, rtol=1e-5, atol=1e-5)


def test_merged_weights(case):
    _, params, _, _, arrays = case
    merged = jpeft.merge(params)
    for layer, own in arrays.items():
        (w,) = (x for k, x in merged[layer].items() if k != "bias")
        np.testing.assert_allclose(w, kernel(own["merged"]), rtol=1e-5, atol=1e-6)


def test_gradients(case):
    model, params, x, _, arrays = case
    trainable, frozen = jpeft.partition(params)

    def loss(trainable):
        return jnp.sum(jpeft.apply(model, {"params": jpeft.combine(trainable, frozen)}, x) ** 2) / 2

    gradients = jax.jit(jax.grad(loss))(trainable)
    for layer, own in arrays.items():
        (node,) = (x for k, x in gradients[layer].items() if k != "bias")
        for found, want in ((node.a, factor(own["a_gradient"])), (node.b, factor(own["b_gradient"]))):
            np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
