"""Adapters on a quantized base: gradients, layers scanned and unrolled, and what a step keeps in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formats import NF4

import jpeft


STACKED = {"kernel": "sio"}


def scanned(params, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["kernel"])[0]


def unrolled(params, x):
    for w in params.values():
        x = jnp.tanh(x @ w)
    return x


def value_and_gradients(fn, params, x):
    trainable, frozen = jpeft.partition(params)

    def loss(trainable, x):
        return jnp.sum(jpeft.apply(fn, jpeft.combine(trainable, frozen), x) ** 2)

    return jax.jit(jax.value_and_grad(loss, (0, 1)))(trainable, x)


def close(got, want):
    """Equal, to the rounding of the greatest number."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * np.abs(b).max())


@pytest.fixture
def weights(normal):
    return normal(3, 64, 64) / 8


def test_gradients_are_those_on_the_rounded_weights(node_class, weights, normal):
    """Scanned over codes, and unrolled over plain arrays."""
    x, b = normal(5, 64), normal(3, 2, 64)
    stack = jpeft.lora({"kernel": node_class.node(weights, "sio")}, rank=2, targets=STACKED)["kernel"].replace(b=b)
    rounded = [node_class.node(w).value() for w in weights]
    alone = {n: jpeft.LoRA(base=w, a=stack.a[n], b=b[n], scale=stack.scale) for n, w in enumerate(rounded)}
    loss, (gradients, dx) = value_and_gradients(scanned, {"kernel": stack}, x)
    want, (wanted, want_dx) = value_and_gradients(unrolled, alone, x)
    close((loss, dx), (want, want_dx))
    got = gradients["kernel"]
    for n in range(3):
        close([got.a[n], got.b[n]], [wanted[n].a, wanted[n].b])
        assert jnp.any(got.a[n]) and jnp.any(got.b[n])


def test_a_product_by_hand(node_class, normal):
    w, x, g = normal(64, 6), normal(5, 64), normal(5, 6)
    node = node_class.node(w)
    y, pull = jax.vjp(lambda x: jpeft.apply(lambda p, x: x @ p["kernel"], {"kernel": node}, x), x)
    close(y, x @ node.value())
    close(pull(g)[0], g @ node.value().T)


def test_a_batch_of_kernels(node_class, weights, normal):
    x = normal(3, 5, 64)
    node = node_class.node(weights, "sio")
    got = jpeft.apply(lambda p, x: jnp.einsum("eti,eio->eto", x, p["kernel"]), {"kernel": node}, x)
    want = jnp.stack([x[n] @ node_class.node(weights[n]).value() for n in range(3)])
    close(got, want)


WIDTH, TOKENS, RANK = 256, 8, 4


def step_bytes(form, layers, whole=False):
    """Temporary bytes of the gradient of `layers` scanned layers; `whole` dequantizes all of them first."""
    w = jax.ShapeDtypeStruct((layers, WIDTH, WIDTH), jnp.float32)
    adapted = lambda w: jpeft.lora({"kernel": form.node(w, "sio")}, rank=RANK, targets=STACKED)
    trainable, frozen = jpeft.partition(jax.eval_shape(adapted, w))

    def loss(trainable, frozen, x):
        node = jpeft.combine(trainable, frozen)["kernel"]
        node = node.replace(base=node.base.value()) if whole else node
        return jnp.sum(jpeft.apply(scanned, {"kernel": node}, x))

    x = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.float32)
    return jax.jit(jax.grad(loss)).lower(trainable, frozen, x).compile().memory_analysis().temp_size_in_bytes


def budget(layers):
    """One dequantized layer, and what every layer keeps: activations, and gradients of its adapters."""
    return 4 * WIDTH * WIDTH + layers * (3 * 4 * TOKENS * WIDTH + 2 * 4 * 2 * RANK * WIDTH)


@pytest.mark.parametrize("layers", [4, 16])
def test_one_dequantized_layer_at_a_time(node_class, layers):
    assert step_bytes(node_class, layers) < budget(layers)


def test_dequantizing_first_takes_every_layer():
    assert step_bytes(NF4, 4, whole=True) > 4 * 4 * WIDTH * WIDTH > budget(4)
