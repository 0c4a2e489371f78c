"""LoRA-GA: its first step against one of full fine-tuning, its start against PEFT's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_driven import LAYERS, PARAMS, X, Y, forward, loss, network, peft

import jpeft


GRADIENTS = jpeft.gradient_scores(loss, PARAMS, [(X, Y)])


@pytest.mark.parametrize("gamma", [16.0, None])
def test_first_step_is_the_nearest_of_its_rank(gamma):
    """What a small step of gradient descent changes is a multiple of the part of G of rank 2r."""
    tuned = jpeft.lora_ga(PARAMS, gradients=GRADIENTS, rank=2, gamma=gamma, targets="0/kernel")
    np.testing.assert_array_equal(forward(tuned, X), network(PARAMS, X))
    node, g = tuned["0"]["kernel"], GRADIENTS["0"]["kernel"]
    da, db = g @ node.b.T, node.a.T @ g
    u, s, v = np.linalg.svd(g)
    part = u[:, :4] * s[:4] @ v[:4]
    c = 1.0 if gamma is None else 16**0.25 / 4
    np.testing.assert_allclose(da @ node.b + node.a @ db, c**2 * part, atol=1e-4 * np.abs(part).max())


def test_the_step_is_that_of_training():
    """Of the loss, through `apply`: both factors move as the gradient says."""
    tuned = jpeft.lora_ga(PARAMS, gradients=GRADIENTS, rank=2, alpha=6, targets="0/kernel")
    trainable, frozen = jpeft.partition(tuned)
    grads = jax.grad(lambda t: loss(jpeft.combine(t, frozen), (X, Y)))(trainable)["0"]["kernel"]
    node, g = tuned["0"]["kernel"], GRADIENTS["0"]["kernel"]
    np.testing.assert_allclose(grads.a, 3 * g @ node.b.T, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(grads.b, 3 * node.a.T @ g, rtol=1e-3, atol=1e-3)


def test_scale_of_gradients_and_of_width():
    """The start does not depend on the former; its size is the fourth root of the outputs."""
    start = lambda scale: jpeft.lora_ga(PARAMS, gradients=jax.tree.map(lambda g: scale * g, GRADIENTS), rank=2)
    for n, width in zip(LAYERS, (16, 8), strict=True):
        one, other = start(1.0)[n]["kernel"], start(1e-3)[n]["kernel"]
        np.testing.assert_allclose(one.a @ one.a.T, other.a @ other.a.T, atol=1e-4)
        for gram in (one.a.T @ one.a, one.b @ one.b.T):
            np.testing.assert_allclose(gram, width**0.5 / 16 * np.eye(2), atol=1e-5)


@pytest.mark.parametrize(("case", "gamma"), [("lora_ga", 16.0), ("lora_ga_unit", None)])
def test_starts_where_peft_does(case, gamma):
    """With the singular values in B."""
    tuned = jpeft.lora_ga(PARAMS, gradients=GRADIENTS, rank=2, alpha=6, gamma=gamma, weighted=True)
    for n in LAYERS:
        a, b, scale = peft(case, n)
        node = tuned[n]["kernel"]
        assert node.scale == scale
        signs = np.sign(np.sum(a * node.a, 0))  # of singular vectors, which pairs of them share
        np.testing.assert_allclose(node.a * signs[None], a, atol=1e-4)
        np.testing.assert_allclose(np.abs(node.b), np.abs(b), rtol=1e-3, atol=1e-4 * np.abs(b).max())


def test_of_stacked_kernels_on_codes():
    w, g = jax.random.normal(jax.random.key(0), (3, 8, 6)), jax.random.normal(jax.random.key(1), (3, 8, 6))
    base = jpeft.nf4({"w": w}, block=4, targets={"w": "sio"})
    node = jpeft.lora_ga(base, gradients={"w": g}, rank=2, targets={"w": "sio"})["w"]
    for n in range(3):
        u = np.linalg.svd(g[n])[0][:, :2]
        np.testing.assert_allclose(node.a[n] @ node.a[n].T, 6**0.5 / 16 * u @ u.T, atol=1e-5)
    np.testing.assert_array_equal(node.value(), base["w"].value())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"rank": 5}, "12 inputs and 16 outputs|16 inputs and 8 outputs has no rank=5 twice"),
        ({"rank": 0}, "rank of at least 1"),
        ({"gradients": {"0": {"kernel": jnp.ones((16, 12))}}}, r"lacks 0/kernel: \(12, 16\); 2/kernel: \(16, 8\)\. "),
    ],
)
def test_refuses(how, message):
    with pytest.raises(ValueError, match=message):
        jpeft.lora_ga(PARAMS, **{"gradients": GRADIENTS, **how})
