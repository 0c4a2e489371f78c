"""Dropout of a node's input: a mask of its own for every use of every kernel, in every layer; off without a key."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from constructs import normal
from jax import lax

import jpeft


N, D, RATE = 64, 16, 0.25
X = 1 + jnp.abs(normal(N, D))


def mask_of(y):
    """Of outputs whose node drops and does nothing else: what it kept, all of it scaled by `1 / (1 - RATE)`."""
    kept = np.asarray(y != 0)
    np.testing.assert_allclose(np.asarray(y), np.where(kept, np.broadcast_to(X / (1 - RATE), y.shape), 0), rtol=1e-6)
    assert abs(kept.mean() - (1 - RATE)) < 5 * (RATE * (1 - RATE) / kept.size) ** 0.5
    return kept


def scan(ws, x):
    return lax.scan(lambda _, w: (None, x @ w), None, ws)[1]


USES = {
    "scan": scan,
    "scan of remat": lambda ws, x: lax.scan(lambda _, w: (None, jax.checkpoint(jnp.matmul)(x, w)), None, ws)[1],
    "fori_loop": lambda ws, x: lax.fori_loop(0, 3, lambda n, y: y.at[n].set(x @ ws[n]), jnp.zeros((3, N, D))),
    "while_loop": lambda ws, x: lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1].at[c[0]].set(x @ ws[0])), (0, jnp.zeros((3, N, D)))
    )[1],
    "experts": lambda ws, x: jnp.einsum("ti,eio->eto", x, ws),
    "unrolled": lambda ws, x: jnp.stack([x @ ws[n] for n in range(3)]),
    "one kernel, used three times": lambda ws, x: jnp.stack([x @ ws[0] for _ in range(3)]),
    "one function, called three times": lambda ws, x: jnp.stack([jax.jit(jnp.matmul)(x, ws[0]) for _ in range(3)]),
}


def dropping(shape, axes):
    """A node of W = 0 and A = B = 1: its output is what it kept of its input."""
    eye = jnp.broadcast_to(jnp.eye(D), shape)
    return jpeft.lora({"w": 0 * eye}, rank=D, dropout=RATE, targets={"w": axes})["w"].replace(a=eye, b=eye)


@pytest.mark.parametrize("name", USES)
def test_masks(name):
    params = {"w": dropping((3, D, D), "sio")}
    run = jax.jit(lambda key: jpeft.apply(lambda params, x: USES[name](params["w"], x), params, X, rngs=key))
    y = run(jax.random.key(0))
    masks = mask_of(y)
    assert all((masks[m] != masks[n]).any() for m in range(3) for n in range(m))
    np.testing.assert_array_equal(run(jax.random.key(0)), y)
    assert (mask_of(run(jax.random.key(1))) != masks).any()


def test_every_kernel_has_masks_of_its_own():
    params = {"v": dropping((D, D), "io"), "w": dropping((D, D), "io")}
    v, w = jpeft.apply(lambda p, x: (x @ p["v"], x @ p["w"]), params, X, rngs=jax.random.key(0))
    assert (mask_of(v) != mask_of(w)).any()


def test_keys():
    """Off without a `"dropout"` key, on with it or with a bare key, of the old kind too."""
    params = {"w": dropping((D, D), "io")}
    run = lambda rngs: jpeft.apply(lambda p, x: x @ p["w"], params, X, rngs=rngs)
    for rngs in (None, {}, {"params": jax.random.key(0)}):
        np.testing.assert_allclose(run(rngs), X, rtol=1e-6)
    np.testing.assert_array_equal(run({"dropout": jax.random.key(0)}), run(jax.random.key(0)))
    np.testing.assert_array_equal(run(jax.random.PRNGKey(0)), run(jax.random.key(0)))


def test_a_custom_backward_pass_sees_no_masks():
    """Nor does the forward pass drop anything then: the two would not belong together."""
    product = jax.custom_vjp(jnp.matmul)
    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, ct: (ct @ saved[1].T, saved[0].T @ ct))
    y = jpeft.apply(lambda p, x: product(x, p["w"]), {"w": dropping((D, D), "io")}, X, rngs=jax.random.key(0))
    np.testing.assert_allclose(y, X, rtol=1e-6)


def test_gradients_see_the_mask():
    """dL/dA = drop(x)^T 1 (B 1)^T, where L is the sum of the outputs."""
    run = lambda node: jpeft.apply(lambda p, x: x @ p["w"], {"w": node}, X, rngs=jax.random.key(0))
    node, dropped = dropping((D, D), "io"), run(dropping((D, D), "io"))
    node = node.replace(b=normal(D, D))
    gradient = jax.grad(lambda a: jnp.sum(run(node.replace(a=a))))(node.a)
    want = jnp.sum(dropped, axis=0)[:, None] * jnp.sum(node.b, axis=1)[None]
    np.testing.assert_allclose(gradient, want, rtol=1e-4)


def test_a_key_by_itself_reaches_nodes_beside_modules():
    """As one under the name "dropout" does."""
    model = nn.Dense(D)
    params = model.init(jax.random.key(1), X)["params"]
    node = jpeft.bottleneck(params, width=4, targets="", dropout=0.5, init="houlsby")
    run = lambda rngs: jpeft.apply(model, {"params": jax.tree.map(lambda x: x + 0.1, node)}, X, rngs=rngs)
    assert np.abs(run(jax.random.key(0)) - run(None)).max() > 1e-3
