"""An `Amplified` node in every operation: the outputs are scaled where they are, or its value is taken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

import jpeft


def einsum(equation):
    return lambda w, x: jnp.einsum(equation, x, w)


def convolution(w, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, (1, 2), "SAME", dimension_numbers=numbers)


def routed(w, x):
    return jax.lax.ragged_dot(x, w, jnp.array([1, 0, 4]))


def scanned(w, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


# what the model does with w, the letters and shape of w, the shape of x, and what becomes of the node
CASES = {
    "dense": (einsum("bi,io->bo"), "io", (4, 6), (3, 4), "branched"),
    "left": (lambda w, x: jnp.einsum("io,ib->ob", w, x), "io", (4, 6), (4, 3), "branched"),
    "heads": (einsum("bti,ihd->bhtd"), "ioo", (4, 2, 3), (2, 5, 4), "branched"),
    "from_heads": (einsum("bthd,hdo->bto"), "iio", (2, 3, 4), (2, 5, 2, 3), "branched"),
    "stored_turned": (einsum("bi,oi->bo"), "oi", (6, 4), (3, 4), "branched"),
    "reshaped": (lambda w, x: x @ w.reshape(4, 6), "ioo", (4, 2, 3), (3, 4), "branched"),
    "experts": (einsum("ebi,eio->ebo"), "sio", (3, 4, 6), (3, 2, 4), "branched"),
    "experts_of_all": (einsum("bi,eio->beo"), "sio", (3, 4, 6), (2, 4), "branched"),
    "experts_summed": (einsum("ebi,eio->bo"), "sio", (3, 4, 6), (3, 2, 4), "merged"),
    "turned": (lambda w, x: x @ w.T, "io", (4, 6), (3, 6), "merged"),
    "scalar": (lambda w, x: x @ (w * 3.0), "io", (4, 6), (3, 4), "branched"),
    "convolution": (convolution, "iiio", (2, 3, 4, 5), (2, 6, 7, 4), "branched"),
    "routed": (routed, "sio", (3, 4, 6), (5, 4), "branched"),
    "scanned": (scanned, "sio", (3, 4, 4), (2, 4), "branched"),
    "sum": (lambda w, x: jnp.sum(w) + x, "io", (4, 6), (3, 4), "merged"),
}


@pytest.mark.parametrize("name", CASES)
def test_amplified(name):
    """Output and gradients are those of the merged kernel, as is the order of nodes below and above."""
    model, axes, shape, x_shape, how = CASES[name]
    fn = lambda params, x: model(params["w"], x)
    tuned, x = {"w": normal(0, *shape)}, normal(1, *x_shape)
    for transform in (jpeft.lora, jpeft.dora, jpeft.lora):
        tuned = transform(tuned, rank=2, targets={"w": axes})
    trainable, frozen = jpeft.partition(tuned)
    trainable = jax.tree.map(lambda x: x + 0.5 * normal(2, *x.shape), trainable)
    tuned = jpeft.combine(trainable, frozen)
    assert set(jpeft.coverage(fn, tuned, x).values()) == {how}

    def outcome(run):
        def loss(trainable):
            y = run(jpeft.combine(trainable, frozen))
            return jnp.sum(jnp.sin(y)), y

        return jax.tree.leaves(jax.jit(jax.grad(loss, has_aux=True))(trainable))

    found, want = outcome(lambda p: jpeft.apply(fn, p, x)), outcome(lambda p: fn(jpeft.merge(p), x))
    for one, other in zip(found, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5 * np.abs(other).max())


def test_lookup():
    fn = lambda params, ids: params["w"][ids]
    tuned = jpeft.dora({"w": normal(0, 9, 6)}, rank=2, targets={"w": "io"})
    tuned = jax.tree.map(lambda x: x + normal(2, *x.shape), tuned)
    ids = jnp.array([[1, 8], [3, 1]])
    assert set(jpeft.coverage(fn, tuned, ids).values()) == {"branched"}
    np.testing.assert_allclose(jpeft.apply(fn, tuned, ids), jpeft.merge(tuned)["w"][ids], rtol=1e-5, atol=1e-5)


def test_no_product_of_the_kernels_size():
    """The gradient of the kernel, and with it the largest part of what full fine-tuning costs, is not computed."""
    fn = lambda params, x: x @ params["w"]
    trainable, frozen = jpeft.partition(jpeft.dora({"w": normal(0, 64, 48)}, rank=2, targets="w"))
    loss = lambda t, x: jnp.sum(jpeft.apply(fn, jpeft.combine(t, frozen), x) ** 2)
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(trainable, normal(1, 7, 64))
    shapes = [v.aval.shape for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general" for v in eqn.outvars]
    assert shapes and (64, 48) not in shapes and (48, 64) not in shapes
