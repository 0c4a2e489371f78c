"""Fisher information and sums of gradients against closed forms, on arrays, codes, adapters and scanned layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
import jpeft.testing as laws


X = jax.random.normal(jax.random.key(0), (11, 4))
Y = (jnp.arange(11) % 2).astype(jnp.float32)
PARAMS = {"w": jax.random.normal(jax.random.key(1), (4,)), "head": {"kernel": jnp.ones((2, 2))}, "ids": jnp.arange(3)}
PROBABILITY = jax.nn.sigmoid(X @ PARAMS["w"])


def logistic(params, batch):
    """The mean over a batch of -log p(y | x) of logistic regression."""
    x, y = batch
    z = x @ params["w"]
    return jnp.mean(jnp.logaddexp(0.0, z) - y * z)


def log_probabilities(params, batch):
    return jax.nn.log_softmax(jnp.append(0.0, batch[0] @ params["w"]))


def batches(size, order=None):
    order = np.arange(11) if order is None else order
    return [(X[order[n : n + size]], Y[order[n : n + size]]) for n in range(0, 11, size)]


@pytest.mark.parametrize("size", [1, 4, 11])
def test_fisher_of_logistic_regression(size):
    """The mean of (p - y)^2 x^2, and p (1 - p) x^2 in expectation, however the examples are batched and ordered."""
    order = np.random.default_rng(0).permutation(11)
    found = jpeft.fisher(logistic, PARAMS, batches(size, order))
    assert found["head"] == {"kernel": None} and found["ids"] is None  # neither the head nor integers
    np.testing.assert_allclose(found["w"], np.mean((PROBABILITY - Y)[:, None] ** 2 * X**2, 0), rtol=1e-5)
    expected = jpeft.fisher(log_probabilities, PARAMS, batches(size), expected=True)["w"]
    np.testing.assert_allclose(expected, np.mean((PROBABILITY * (1 - PROBABILITY))[:, None] * X**2, 0), rtol=1e-5)


def test_fisher_is_not_the_square_of_a_mean():
    gradient = np.mean((PROBABILITY - Y)[:, None] * X, 0)
    assert (np.asarray(jpeft.fisher(logistic, PARAMS, batches(11))["w"]) > 1.5 * gradient**2).all()


def test_sums_of_gradients():
    """Signed, squared, and clipped batch by batch."""
    gradients = np.stack([np.mean((jax.nn.sigmoid(x @ PARAMS["w"]) - y)[:, None] * x, 0) for x, y in batches(4)])
    np.testing.assert_allclose(jpeft.gradient_scores(logistic, PARAMS, batches(4))["w"], gradients.sum(0), rtol=1e-5)
    squares = jpeft.gradient_scores(logistic, PARAMS, batches(4), squared=True)["w"]
    np.testing.assert_allclose(squares, (gradients**2).sum(0), rtol=1e-5)
    norms = np.linalg.norm(gradients, axis=1, keepdims=True)
    limit = float(np.median(norms))
    clipped = jpeft.gradient_scores(logistic, PARAMS, batches(4), clip=limit)["w"]
    np.testing.assert_allclose(clipped, (gradients * np.minimum(1, limit / norms)).sum(0), rtol=1e-5)
    assert np.abs(clipped - gradients.sum(0)).max() > 1e-3


def test_clips_by_the_norm_of_all_targets():
    params = {"u": jnp.ones(3), "v": jnp.ones(1)}
    loss = lambda p, x: jnp.sum(3 * p["u"]) + jnp.sum(x * p["v"])
    found = jpeft.gradient_scores(loss, params, [jnp.full((1,), 4.0)], clip=1.0)
    size = np.sqrt(3 * 9 + 16)
    np.testing.assert_allclose(np.append(found["u"], found["v"]), np.array([3, 3, 3, 4]) / size, rtol=1e-6)
    found = jpeft.gradient_scores(loss, params, [jnp.full((1,), 4.0)], clip=1.0, targets="v")
    assert found["u"] is None
    np.testing.assert_allclose(found["v"], [1.0], rtol=1e-6)


BASES = {
    "nf4": lambda params: jpeft.nf4(params, block=4, targets="w"),
    "lora": lambda params: jpeft.lora(params, rank=2, init=lambda k, i, r, o: (jnp.ones((i, r)), jnp.ones((r, o)))),
    "vera": lambda params: jpeft.vera(params, rank=2, targets="w"),
    "delta on lora": lambda params: jpeft.delta(jpeft.lora(params, rank=1, targets="w"), targets="w"),
}


@pytest.mark.parametrize("base", ["nf4", "lora", "vera", "delta on lora"])
def test_gradients_are_those_of_the_value(base):
    """Of what a node stands for, as the merged parameters have them, through `apply`."""
    params = {"w": jax.random.normal(jax.random.key(2), (8, 4))}
    make = BASES[base]
    tuned = make(params) if base != "lora" else BASES["lora"]({"m": {"kernel": params["w"]}})
    name = (lambda t: t["m"]["kernel"]) if base == "lora" else (lambda t: t["w"])
    fn = lambda p, x: jnp.sum(jnp.tanh(x @ name(p)) ** 2)
    loss = lambda p, x: jpeft.apply(fn, p, x)
    x = jax.random.normal(jax.random.key(3), (5, 8))
    found = jpeft.gradient_scores(loss, tuned, [x])
    expected = jax.grad(fn)(jpeft.merge(tuned), x)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    np.testing.assert_allclose(name(found), name(expected), rtol=1e-4, atol=1e-5)
    squares = jpeft.fisher(loss, tuned, [x])
    each = jax.vmap(lambda one: jax.grad(fn)(jpeft.merge(tuned), one[None]))(x)
    np.testing.assert_allclose(name(squares), np.mean(np.square(name(each)), 0), rtol=1e-4, atol=1e-5)


def test_of_a_boxed_parameter():
    box = nn.Partitioned(jnp.ones((3, 2)), names=("x", None))
    loss = lambda p, x: jnp.sum(x @ p["w"].unbox())
    found = jpeft.gradient_scores(loss, {"w": box}, [jnp.ones((2, 3))])
    np.testing.assert_array_equal(found["w"], jnp.full((3, 2), 2.0))


@pytest.mark.slow
def test_of_scanned_layers_and_what_is_beside_modules():
    """A scanned model with an adapter beside modules has the gradients of one with layers one by one."""
    subject = laws.subject("decoder", scan=True, base="nf4")
    tuned = jpeft.bottleneck(subject.params, width=2, sites=subject.sites)
    loss = lambda p, ids: jnp.mean(jpeft.apply(subject.model, {"params": p}, ids) ** 2)
    found = jpeft.gradient_scores(loss, tuned, [subject.args[0]], targets=".*/(kernel|scale)")
    expected = jax.grad(loss)(jpeft.merge(subject.params), subject.args[0])
    assert jax.tree.structure(found, is_leaf=lambda x: x is None) == jax.tree.structure(expected)
    assert found["embed"]["embedding"] is None
    for path, x in jax.tree_util.tree_leaves_with_path(found):
        np.testing.assert_allclose(x, dict(jax.tree_util.tree_leaves_with_path(expected))[path], rtol=1e-3, atol=1e-6)


def test_sums_are_in_float32():
    params = {"w": jnp.ones((2,), jnp.bfloat16)}
    loss = lambda p, x: jnp.sum(x.astype(jnp.bfloat16) @ p["w"])
    found = jpeft.gradient_scores(loss, params, [jnp.ones((1, 2))] * 300)["w"]
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, [300.0, 300.0])  # in bfloat16 it would stay at 256


def test_expected_needs_classes():
    with pytest.raises(ValueError, match=r"log p of one example, \(classes,\), not \(\)"):
        jpeft.fisher(logistic, PARAMS, batches(4), expected=True)


def test_targets_that_match_nothing():
    with pytest.raises(ValueError, match="'nowhere' matches no parameter"):
        jpeft.fisher(logistic, PARAMS, batches(4), targets="nowhere")


OPTIMIZERS = {
    "adamw": optax.adamw(0.1, weight_decay=0.5),
    "schedule_free": optax.contrib.schedule_free_sgd(1.0),  # its state starts from the parameters
    "prodigy": optax.contrib.prodigy(estim_lr0=0.1),  # and of this one holds them, and the same zeros twice
}


@pytest.mark.parametrize("base", [lambda p: p, lambda p: jpeft.delta(p, targets="w")], ids=["plain", "delta"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_priming_is_training(base, optimizer):
    """The changes are those of a loop over the batches with the same optimizer, weight decay included."""
    tx = OPTIMIZERS[optimizer]
    with jax.numpy_dtype_promotion("standard"):
        found = jpeft.prime(logistic_of_value, base(PARAMS), batches(4), optimizer=tx, targets="w")
        w, state = PARAMS["w"], tx.init(PARAMS["w"])
        for batch in batches(4):
            grads = jax.grad(lambda w, batch=batch: logistic({"w": w}, batch))(w)
            updates, state = tx.update(grads, state, w)
            w = w + updates
    np.testing.assert_allclose(found["w"], w - PARAMS["w"], rtol=1e-4, atol=1e-6)
    assert found["head"] == {"kernel": None} and np.abs(found["w"]).min() > 1e-2


def logistic_of_value(params, batch):
    return jpeft.apply(logistic, params, batch, allow_unused=True)
