"""A few frequencies: what the transform of the change is, one frequency as a cosine, and how places are shared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft


def node(places, c, shape=(12, 8), scale=1.0):
    return jpeft.FourierFT(c=jnp.asarray(c), indices=jnp.asarray(places), shape=shape, scale=scale)


def test_one_frequency_is_a_cosine():
    p, q = np.ogrid[:12, :8]
    want = 150 * 0.7 * np.cos(2 * np.pi * (5 * p / 12 + 3 * q / 8)) / (12 * 8)
    found = node([5 * 8 + 3], [0.7], scale=150.0).change()
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-6)


def test_the_transform_of_the_change():
    """Of the real part, it is half the spectrum and half its mirror image."""
    c = jax.random.normal(jax.random.key(0), (10,))
    places = jax.random.permutation(jax.random.key(1), 96)[:10]
    spectrum = np.zeros(96)
    spectrum[places] = c
    spectrum = spectrum.reshape(12, 8)
    mirror = np.roll(spectrum[::-1, ::-1], (1, 1), (0, 1))
    found = np.fft.fft2(node(places, c).change())
    np.testing.assert_allclose(found, (spectrum + mirror) / 2, rtol=0, atol=1e-5)


def test_branch_and_gradient():
    """The gradient of a sum is the real part of its transform."""
    places, x = jnp.array([3, 17, 90]), jax.random.normal(jax.random.key(0), (2, 5, 12))
    g = jax.random.normal(jax.random.key(1), (12, 8))
    fourier = node(places, jnp.array([1.0, -2.0, 0.5]))
    np.testing.assert_allclose(fourier.branch(x, None), x @ fourier.change(), rtol=0, atol=1e-5)
    found = jax.grad(lambda c: jnp.sum(g * fourier.replace(c=c).change()))(fourier.c)
    np.testing.assert_allclose(found, np.fft.ifft2(g).real.ravel()[places], rtol=0, atol=1e-6)


def test_places_are_shared_by_kernels_of_one_shape():
    params = {n: {"kernel": jnp.ones(s)} for n, s in {"a": (6, 8), "b": (6, 8), "c": (8, 6)}.items()}
    tuned = jpeft.fourierft(params, frequencies=48)
    assert set(tuned["jpeft_shared"]) == {"fourierft_6x8", "fourierft_8x6"}
    assert tuned["a"]["kernel"].indices == tuned["b"]["kernel"].indices
    np.testing.assert_array_equal(np.sort(tuned["jpeft_shared"]["fourierft_6x8"]), np.arange(48))
    assert np.any(tuned["a"]["kernel"].c != tuned["b"]["kernel"].c)


def test_start():
    params = {"kernel": jnp.ones((64, 32))}
    zeros, normal = (jpeft.fourierft(params, frequencies=400, init=init) for init in ("zeros", "normal"))
    np.testing.assert_array_equal(jpeft.merge(zeros)["kernel"], params["kernel"])
    change = jpeft.merge(normal)["kernel"] - 1
    np.testing.assert_allclose(change.std(), 150 * (400 / 2) ** 0.5 / (64 * 32), rtol=0.1)  # half is in the real part


def test_refuses():
    params = {n: {"kernel": jnp.ones(s)} for n, s in {"a": (6, 8), "b": (30, 40), "c": (8, 5)}.items()}
    with pytest.raises(ValueError, match=r"(?s)1000 freq.*a/kernel: \(6, 8\).*c/kernel: \(8, 5\)$"):
        jpeft.fourierft(params)
    with pytest.raises(ValueError, match="'gaussian': one of normal, zeros"):
        jpeft.fourierft(params, init="gaussian")


def test_the_change_is_not_kept_for_the_backward_pass():
    trainable, frozen = jpeft.partition(jpeft.fourierft({"w": jnp.ones((64, 64))}, frequencies=20, targets="w"))
    run = lambda trainable: jpeft.apply(lambda p, x: x @ p["w"], jpeft.combine(trainable, frozen), jnp.ones((2, 64)))
    assert sum(x.size for x in jax.tree.leaves(jax.vjp(run, trainable)[1])) < 1000
