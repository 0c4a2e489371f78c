"""What is known of MoSLoRA in closed form: the mixer can be taken into A, and as the identity it is LoRA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

import jpeft


W, X = normal(0, 7, 5), normal(1, 4, 7)


def run(node):
    return jpeft.apply(lambda params, x: x @ params["w"], {"w": node}, X)


def tuned(**options):
    node = jpeft.moslora({"w": W}, rank=3, alpha=6, targets="w", **options)["w"]
    return node.replace(b=normal(2, 3, 5))


def test_is_lora_with_the_mixer_in_a():
    node = tuned()
    lora = jpeft.LoRA(base=W, a=node.a @ node.mixer, b=node.b, scale=2.0)
    np.testing.assert_allclose(run(node), run(lora), rtol=1e-4, atol=1e-5)
    plain = jpeft.LoRA(base=W, a=node.a, b=node.b, scale=2.0)
    np.testing.assert_allclose(run(node.replace(mixer=jnp.eye(3))), run(plain), rtol=1e-4, atol=1e-5)
    assert np.abs(run(node) - run(plain)).max() > 0.1


def test_start():
    """W' = W, and of the three it is B that trains first: a mixer of zeros would keep all of them where they are."""
    node = jpeft.moslora({"w": W}, rank=3, targets="w")["w"]
    np.testing.assert_array_equal(run(node), X @ W)
    gradient = jax.grad(lambda node: jnp.sum(run(node) ** 2))(node)
    assert np.all(gradient.b != 0) and np.all(gradient.a == 0) and np.all(gradient.mixer == 0)


def test_mixers():
    node = jpeft.moslora({"w": jnp.zeros((80, 64))}, rank=64, targets="w")["w"]
    bound = 64**-0.5
    assert 0.99 * bound < np.abs(node.mixer).max() <= bound
    np.testing.assert_allclose(np.std(node.mixer) / bound, 3**-0.5, atol=0.02)
    assert np.all(node.mixer != node.a[:64])
    mixer = tuned(mixer="orthogonal").mixer
    np.testing.assert_allclose(mixer @ mixer.T, jnp.eye(3), atol=1e-6)


def test_refuses():
    with pytest.raises(ValueError, match="'zeros': one of uniform, orthogonal"):
        tuned(mixer="zeros")
