"""Methods of all families on one tree, in every order: they act together, or say why they cannot."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods import METHODS

import jpeft
from jpeft.testing import shaken, subject


NAMES = (
    "lora", "dora", "oft", "bitfit_created", "ia3", "houlsby", "parallel", "compacter", "loreft", "prompt", "prefix",
    "llama_adapter", "moe_lora", "unipelt",
)  # fmt: skip
QUICK = {("lora", second) for second in ("dora", "ia3", "houlsby", "prompt", "prefix")}  # others run after the rest
MAKE = {method.name: method.make for method in METHODS}
MODEL = subject("decoder")
REFUSED = {("unipelt", "unipelt"): "This tree has gates"}  # (first, second) -> what the error says


def tuned(name, params, seed):
    """The tree after a method that has trained: with noise in all that trains, and with what trained before."""
    trainable, frozen = jpeft.partition(MAKE[name](params, MODEL.sites, jax.random.key(seed)))
    return jpeft.combine(shaken(trainable, jax.random.key(seed + 1)), frozen)


def case(first, second):
    marks = [] if (first, second) in QUICK else [pytest.mark.slow]
    return pytest.param(first, second, marks=marks)


@pytest.mark.parametrize(("first", "second"), [case(*pair) for pair in itertools.product(NAMES, NAMES)])
def test_pair(first, second):
    """Both act, all of both trains, and what frozen arrays there are stay out of the gradient."""
    once = tuned(first, MODEL.params, 2)
    if (first, second) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[first, second]):
            MODEL(tuned(second, once, 4))
        return
    twice = tuned(second, once, 4)
    trainable, frozen = jpeft.partition(twice)

    @jax.jit
    def outputs(trainable):
        y = MODEL(jpeft.combine(trainable, frozen)).astype(jnp.float32)
        return jnp.mean(jnp.square(y - jnp.cos(jnp.arange(y.size)).reshape(y.shape))), y

    (_, y), grads = jax.value_and_grad(outputs, has_aux=True)(trainable)
    assert np.isfinite(y).all()
    assert np.abs(y - MODEL.run(once)).max() > 1e-3, "the second method changes nothing"
    assert np.abs(y - MODEL.run(tuned(second, MODEL.params, 4))).max() > 1e-3, "the first method changes nothing"
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.abs(g).max() > 0, f"the gradient of {jax.tree_util.keystr(path)} is zero"
