"""APOLLO: full gradients, scaled by what random projections tell."""

import authors_steps
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_galore import SHAPES, gradients, in_torch, of_kernel

from jpeft.optim import _projection, apollo


KEY = jax.random.key(7)


def drawn(shape, steps, rank, every):
    """The projections of a lone kernel, as in torch's orientation."""
    small = min(shape)
    of = _projection.random(every, rank, KEY).of
    found = [of({"kernel": jnp.zeros((small, max(shape)))}, {}, jnp.int32(n))["kernel"] for n in range(steps)]
    return [np.array(p.T if shape[0] <= shape[1] else p, np.float64) for p in found]


@pytest.mark.parametrize("per", ["channel", "tensor"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_as_the_authors_step(shape, per):
    grads = gradients(shape)
    found, _ = of_kernel(apollo(1.0, rank=2, every=3, scale=9.0, per=per, key=KEY), grads)
    projections = drawn(shape, len(grads), 2, 3)
    expected = authors_steps.apollo(in_torch(grads), projections, scale=9.0, per=per)
    for u, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(u, -e.T, rtol=1e-4, atol=1e-4)


def test_projections_change_every_so_many_steps_and_keep_lengths_on_average():
    found = drawn((64, 4096), 6, 8, 3)
    for n in range(6):
        assert (found[n] == found[n - n % 3]).all()
    assert (found[0] != found[3]).all()
    x = np.random.default_rng(0).normal(size=64)
    many = np.stack([p @ x for p in drawn((64, 64), 200, 8, 1)])
    np.testing.assert_allclose(np.mean(np.sum(many**2, axis=1)), np.sum(x**2), rtol=0.1)


def test_an_identity_for_a_projection_of_one_entry_a_channel_is_adam(monkeypatch):
    eye = _projection.Projection(lambda g, *_: {n: jnp.eye(m.shape[-2]) for n, m in g.items()}, kept=False)
    monkeypatch.setattr("jpeft.optim._apollo.random", lambda *_: eye)
    grads = [jnp.abs(g) for g in gradients((1, 6))]  # where a moment has the sign of the gradient
    found, _ = of_kernel(apollo(0.1, rank=1, limit=None), grads)
    with jax.numpy_dtype_promotion("standard"):  # Optax counts steps in integers
        expected, _ = of_kernel(optax.adam(0.1), grads)
    chex.assert_trees_all_close(found, expected, rtol=1e-4)


def test_every_update_is_its_gradient_channel_by_channel():
    grads = gradients((4, 6), 3)
    found, _ = of_kernel(apollo(0.1, rank=2), grads)
    for u, g in zip(found, grads, strict=True):
        ratio = -u / g
        assert (ratio > 0).all()
        np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:1], (4, 6)), rtol=1e-4)
        assert np.ptp(ratio[0]) > 1e-3
    (u, *_), _ = of_kernel(apollo(0.1, rank=1, per="tensor"), grads)
    np.testing.assert_allclose(u / grads[0], np.full((4, 6), (u / grads[0])[0, 0]), rtol=1e-4)


def test_another_key_is_another_projection():
    grads = gradients((4, 6), 2)
    one, again, other = (of_kernel(apollo(0.1, rank=2, key=jax.random.key(n)), grads)[0] for n in (0, 0, 1))
    chex.assert_trees_all_equal(one, again)
    assert (one[0] != other[0]).any()


def test_ratios_are_per_channel_or_per_tensor():
    with pytest.raises(ValueError, match="`per` is 'row': one of channel, tensor"):
        apollo(0.1, per="row")


def test_an_update_that_was_zero_can_grow():
    """As that of an expert without tokens in a step: of zero, a factor would be a bound for ever."""
    g = gradients((4, 6), 1)[0]
    idle, _ = of_kernel(apollo(1.0, rank=2), [g, jnp.zeros((4, 6)), g])
    assert np.linalg.norm(idle[-1]) > 0.1 * np.linalg.norm(idle[0])
