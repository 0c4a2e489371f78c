"""What is known of VeRA in closed form: it is LoRA with scaled factors, of which one pair serves all kernels."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

import jpeft


def weights():
    return {"up": {"kernel": normal(0, 6, 9)}, "down": {"kernel": normal(1, 9, 4)}}


def model(params, x):
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


def shaken(params):
    """The tree with random d and b."""
    trainable, frozen = jpeft.partition(params)
    return jpeft.combine(jax.tree.map(lambda x: x + normal(2, *x.shape), trainable), frozen)


def test_is_lora_with_scaled_parts_of_one_pair():
    params, x = shaken(jpeft.vera(weights(), rank=5)), normal(3, 4, 6)
    a, b = params["jpeft_shared"]["vera_a"], params["jpeft_shared"]["vera_b"]
    assert (a.shape, b.shape) == ((9, 5), (5, 9))
    lora = {}
    for name, (d_in, d_out) in {"up": (6, 9), "down": (9, 4)}.items():
        node = params[name]["kernel"]
        left, right = a[:d_in] @ jnp.diag(node.d), b[:, :d_out] @ jnp.diag(node.b)
        lora[name] = {"kernel": jpeft.LoRA(base=node.base, a=left, b=right, scale=1.0)}
    np.testing.assert_allclose(jpeft.apply(model, params, x), jpeft.apply(model, lora, x), rtol=1e-4, atol=1e-4)


def test_start():
    """d = 0.1 and b = 0; only b has a gradient; the pair is uniform, by the widest kernel, and does not train."""
    params = jpeft.vera({"w": normal(0, 300, 200)}, rank=50, targets="w")
    a, b = params["jpeft_shared"]["vera_a"], params["jpeft_shared"]["vera_b"]
    for x, fan in ((a, 300), (b, 50)):
        bound = (6 / fan) ** 0.5
        assert 0.99 * bound < np.abs(x).max() <= bound
        np.testing.assert_allclose(np.std(x) / bound, 3**-0.5, rtol=0.02)
    trainable, frozen = jpeft.partition(params)
    assert {x.shape for x in jax.tree.leaves(trainable)} == {(50,), (200,)}
    np.testing.assert_array_equal(params["w"].d, np.full(50, 0.1, np.float32))
    run = lambda t: jpeft.apply(lambda params, x: x @ params["w"], jpeft.combine(t, frozen), normal(1, 3, 300))
    gradient = jax.grad(lambda t: jnp.sum(run(t) ** 2))(trainable)["w"]
    assert np.all(gradient.d == 0) and np.all(gradient.b != 0)


def test_nested():
    """A second one has a pair of its own, and other methods stand on it."""
    params = weights()
    for transform in (jpeft.vera(rank=5), jpeft.vera(rank=3, targets="up/kernel"), jpeft.lora(rank=2)):
        params = shaken(transform(params))
    assert {k: x.shape for k, x in params["jpeft_shared"].items()} == {
        **{"vera_a": (9, 5), "vera_b": (5, 9)},
        **{"vera_a_1": (6, 3), "vera_b_1": (3, 9)},
    }
    x = normal(3, 4, 6)
    np.testing.assert_allclose(jpeft.apply(model, params, x), model(jpeft.merge(params), x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("fn", "shape", "axes", "x"),
    [
        (lambda w, x: jax.lax.ragged_dot(x, w, jnp.array([2, 0, 3])), (3, 8, 6), "sio", normal(4, 5, 8)),
        (lambda w, x: w[x], (8, 6), "io", jnp.array([[1, 7], [3, 1]])),
    ],
    ids=["experts", "table"],
)
def test_of_experts_and_of_a_table(fn, shape, axes, x):
    params = shaken(jpeft.vera({"w": normal(0, *shape)}, rank=5, targets={"w": axes}))
    run = lambda params, x: fn(params["w"], x)
    assert set(jpeft.coverage(run, params, x).values()) == {"branched"}
    np.testing.assert_allclose(jpeft.apply(run, params, x), run(jpeft.merge(params), x), rtol=1e-4, atol=1e-4)


def test_a_parameter_by_itself_knows_no_shared_arrays():
    dense, x = nn.Dense(9, use_bias=False), normal(3, 4, 6)
    params = jpeft.vera(weights()["up"], rank=5)
    with pytest.raises(ValueError, match="vera_a, vera_b of params"):
        dense.apply({"params": params}, x)
    with jpeft.intercept():
        np.testing.assert_allclose(dense.apply({"params": params}, x), x @ params["kernel"].base, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"), [({"rank": 0}, "rank of at least 1"), ({"dropout": 1.0}, "dropout in")]
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.vera(weights(), **options)


def test_refuses_trees_without_a_place_for_shared_arrays():
    with pytest.raises(ValueError, match="list has no such place"):
        jpeft.vera([jnp.ones((4, 6))], targets=".*")
