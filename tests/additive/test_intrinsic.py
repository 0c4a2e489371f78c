"""Intrinsic prompt tuning: the subspace of prompts, and a prompt in it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.testing import subject


LENGTH, FEATURES = 3, 16
SIZE = LENGTH * FEATURES
IDS = jax.random.randint(jax.random.key(1), (2, 6), 0, 32)


def close(found, want, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


def run(params):
    return jpeft.apply(subject("decoder").model, {"params": params}, IDS)


def slope(tree):
    """The gradient of a loss with respect to what trains, and the output."""
    trainable, frozen = jpeft.partition(tree)

    def loss(trainable):
        y = run(jpeft.combine(trainable, frozen))
        return jnp.sum(jnp.cos(jnp.arange(y.size)).reshape(y.shape) * y), y

    grads, y = jax.jit(jax.grad(loss, has_aux=True))(trainable)
    return grads["embed"]["prompt"], y


def layer(key, size, out):
    k, b = jax.random.split(jax.random.key(key))
    return jax.random.normal(k, (size, out)) / size**0.5, jax.random.normal(b, (out,))


def tuned(decoder, **options):
    return jpeft.intrinsic_prompt(subject("decoder").params, decoder=decoder, length=LENGTH, **options)


def test_identity_is_prompt_tuning():
    rows = jax.random.normal(jax.random.key(2), (LENGTH, FEATURES))
    params = tuned(((jnp.eye(SIZE), jnp.zeros(SIZE)),), init=rows.ravel())
    grads, y = slope(params)
    want_grads, want = slope(jpeft.prompt(subject("decoder").params, length=LENGTH, init=rows))
    close(y, want)
    close(grads.z.reshape(LENGTH, FEATURES), want_grads.rows)


def test_gradient_goes_through_the_decoder():
    kernel, bias = layer(0, 5, SIZE)
    params = tuned(((kernel, bias),), init=jnp.arange(5) / 4)
    rows = (jnp.arange(5) / 4 @ kernel + bias).reshape(LENGTH, FEATURES)
    grads, y = slope(params)
    of_rows, want = slope(jpeft.prompt(subject("decoder").params, length=LENGTH, init=rows))
    close(y, want)
    close(grads.z, kernel @ of_rows.rows.ravel())


def test_decoder_by_hand():
    first, second = layer(0, 5, 7), layer(1, 7, SIZE)
    params = tuned((first, second), key=jax.random.key(4))
    node = params["embed"]["prompt"]
    want = np.tanh(node.z @ first[0] + first[1]) @ second[0] + second[1]
    close(node.prompt(None), want.reshape(LENGTH, FEATURES))
    assert node.z.shape == (5,) and 0.005 < np.abs(node.z).mean() < 0.04
    trainable, _ = jpeft.partition(params)
    assert [x.shape for x in jax.tree.leaves(trainable)] == [(5,)]
    plain = jpeft.collapse(params)
    assert type(plain["embed"]["prompt"]) is jpeft.Prompt
    close(run(plain), run(params))


def prompts(rank, tasks=6):
    """Of tasks that lie in a space of `rank` dimensions."""
    codes, basis = (jax.random.normal(jax.random.key(n), s) for n, s in enumerate([(tasks, rank), (rank, SIZE)]))
    return (codes @ basis / rank**0.5).reshape(tasks, LENGTH, FEATURES)


def error(subspace, given):
    return float(jnp.mean(jnp.square(subspace.decode(subspace.encode(given)) - given.reshape(len(given), -1))))


@pytest.fixture
def _standard():
    """Optax counts steps in integers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.usefixtures("_standard")
def test_prompts_are_found_again():
    """All of them where the space has as many dimensions as they do, and not with less."""
    given = prompts(rank=3)
    fit = lambda dimension: jpeft.fit_subspace(
        [given] * 800, dimension=dimension, width=32, optimizer=optax.adam(optax.cosine_decay_schedule(1e-2, 800))
    )
    found = {dimension: error(fit(dimension), given) for dimension in (1, 3)}
    assert found[3] < 1e-4 < 0.01 < found[1], found
    subspace = fit(3)
    z = subspace.encode(given)
    params = tuned(subspace.decoder, init=z[2])
    close(params["embed"]["prompt"].prompt(None), given[2], 0.1)
    assert z.shape == (6, 3) and subspace.decode(z).shape == (6, SIZE)


@pytest.mark.usefixtures("_standard")
def test_distillation_has_the_prompts_and_the_examples():
    """Its gradient is the only one where `weight` is zero; a step by hand tells both terms."""
    given, examples = prompts(rank=3), jnp.arange(6.0)
    distillation = lambda made, x: jnp.sum(jnp.mean(made, axis=(1, 2)) * x)
    options = {"dimension": 2, "width": 4, "key": jax.random.key(5)}
    fit = lambda batches, **more: jpeft.fit_subspace(batches, optimizer=optax.sgd(0.1), **options, **more)
    start = jpeft.fit_subspace([given], optimizer=optax.sgd(0.0), **options)

    def loss(subspace, weight):
        made = subspace.decode(subspace.encode(given)).reshape(given.shape)
        return weight * jnp.mean((made - given) ** 2) + distillation(made, examples)

    for weight in (0.0, 3.0):
        found = fit([(given, examples)], distillation=distillation, weight=weight)
        grads = jax.grad(loss)(start, weight)
        close(found, jax.tree.map(lambda x, g: x - 0.1 * g, start, grads))
        assert np.abs(found.decoder[1][0] - start.decoder[1][0]).max() > 1e-3


@pytest.mark.usefixtures("_standard")
def test_goes_on_after_an_interruption(tmp_path):
    batches = [prompts(rank=3)] * 6
    fit = lambda batches, **how: jpeft.fit_subspace(
        batches, dimension=2, width=4, optimizer=optax.adam(1e-2), progress=False, **how
    )
    fit(batches[:4], resume=tmp_path, save_every=2)
    close(fit(batches, resume=tmp_path), fit(batches), 0)


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "no batches"),
        ([jnp.ones((3, 4))], {}, r"shape=\(3, 4\)"),
        ([jnp.ones((2, 3, 4))], {"dimension": 0}, "dimension=0"),
        ([jnp.ones((2, 3, 4))], {"width": 0}, "width=0"),
    ],
)
def test_fit_refuses(batches, options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.fit_subspace(batches, optimizer=optax.sgd(0.1), **options)


def test_refuses():
    decoder = (layer(0, 5, SIZE),)
    with pytest.raises(ValueError, match=r"`init` has shape \(4,\).*\(5,\)"):
        tuned(decoder, init=jnp.ones(4))
    with pytest.raises(ValueError, match="The decoder makes 48 numbers, and 2 embeddings of 16 features are 32"):
        jpeft.intrinsic_prompt(subject("decoder").params, decoder=decoder, length=2)
