"""Methods on one layer that Hugging Face's PEFT has run: how its arrays come into our nodes, and what is compared."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jpeft


FIXTURES = Path(__file__).parents[1] / "fixtures"
WINDOW = (3, 2)


def turned(x):
    """A torch array `(out, in, *window)` as a matrix `(window in, out)`."""
    return np.transpose(x, (*range(2, x.ndim), 1, 0)).reshape(-1, x.shape[0])


def flat(x):
    """The same of one whose window is flat, and the fastest axis: `(out, in window)`."""
    return turned(x.reshape(x.shape[0], -1, *WINDOW))


def core(x):
    """A core `(rank, rank, *window)` as `(window, rank, rank)`."""
    return np.transpose(x, (2, 3, 1, 0)).reshape(-1, *x.shape[:2])


def same(x):
    return x


def of_case(file, name):
    """The arrays of a case in a file of fixtures, by their names within it."""
    return {key.partition("/")[2]: x for key, x in np.load(FIXTURES / file).items() if key.startswith(f"{name}/")}


def fields(arrays, kind, places):
    """The node's fields, from PEFT's arrays of a kind: `adapter`, `gradient` or `start`."""
    one = lambda place: jnp.asarray(place[1](arrays[f"{kind}/{place[0]}"]))
    return {name: tuple(map(one, at)) if isinstance(at, list) else one(at) for name, at in places.items()}


def layer(arrays):
    """The model of a case, its parameters, the name of its weight, input and output."""
    x, y, weight = (jnp.asarray(arrays[name]) for name in ("x", "y", "base/weight"))
    name, model, params = "kernel", nn.Dense(weight.shape[0]), {"kernel": jnp.asarray(turned(weight))}
    if x.ndim == 4:
        x, y = jnp.moveaxis(x, 1, -1), jnp.moveaxis(y, 1, -1)
        model = nn.Conv(weight.shape[0], WINDOW, strides=(2, 1), padding=((1, 1), (0, 0)))
        params["kernel"] = jnp.transpose(weight, (2, 3, 1, 0))
    elif x.ndim == 2:
        name, model, params = "embedding", nn.Embed(*weight.shape), {"embedding": weight}
    if "base/bias" in arrays:
        params["bias"] = jnp.asarray(arrays["base/bias"])
    return model, params, name, x, y


def adapted(arrays, transform, options, places):
    """The model of a case, its parameters with PEFT's arrays in the node, the node's name, input and output."""
    model, params, name, x, y = layer(arrays)
    params = transform(params, targets=name, sites=jpeft.sites(model, {"params": params}, x), **options)
    found = fields(arrays, "adapter", places)
    assert jax.tree.map(jnp.shape, {n: getattr(params[name], n) for n in found}) == jax.tree.map(jnp.shape, found)
    return model, params | {name: params[name].replace(**found)}, name, x, y


def check_outputs(model, params, x, y):
    np.testing.assert_allclose(jpeft.apply(model, {"params": params}, x), y, rtol=1e-5, atol=1e-5)


def check_merged(model, params, x, y):
    np.testing.assert_allclose(model.apply({"params": jpeft.merge(params)}, x), y, rtol=1e-5, atol=2e-5)


def check_gradients(model, params, name, x, want):
    """The gradients of the loss |y|^2 / 2 with respect to fields of the node."""
    trainable, frozen = jpeft.partition(params)

    def loss(trainable):
        return jnp.sum(jpeft.apply(model, {"params": jpeft.combine(trainable, frozen)}, x) ** 2) / 2

    gradient = jax.jit(jax.grad(loss))(trainable)[name]
    for field, expected in want.items():
        for found, exact in zip(jax.tree.leaves(getattr(gradient, field)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max(), err_msg=field)
