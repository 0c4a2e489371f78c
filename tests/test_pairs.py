"""Any two methods that live in weights nest: of every ordered pair, merged parameters give what `apply` gives."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods import METHODS

import jpeft
from jpeft.testing import shaken


NAMES = (
    "lora", "dora", "pissa", "vera", "gralora", "hira", "loha", "krona", "fourierft", "oft", "hra", "miss", "qalora",
    "delta", "shira", "piggyback",
)  # fmt: skip
MAKE = {method.name: method.make for method in METHODS}


def model(params, x):
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


X = jax.random.normal(jax.random.key(0), (3, 16))
SHAPES = {"up": {"kernel": (16, 32)}, "down": {"kernel": (32, 16)}}
PARAMS = shaken(jax.tree.map(jnp.zeros, SHAPES, is_leaf=lambda x: isinstance(x, tuple)), jax.random.key(1), 0.3)
SITES = jpeft.sites(model, PARAMS, X)
BASES = {"float": PARAMS, "nf4": jpeft.nf4(PARAMS)}


def tuned(name, params, seed):
    """The tree after a method that has trained: with noise in all that trains, and with what trained before."""
    trainable, frozen = jpeft.partition(MAKE[name](params, SITES, jax.random.key(seed)))
    return jpeft.combine(shaken(trainable, jax.random.key(seed + 1)), frozen)


QUICK = "lora"  # it around others, on a float base; all other pairs run after the rest


def case(base, inner, outer):
    marks = [] if (base, outer) == ("float", QUICK) else [pytest.mark.slow]
    return pytest.param(base, inner, outer, marks=marks)


@pytest.mark.parametrize(("base", "inner", "outer"), [case(*x) for x in itertools.product(BASES, NAMES, NAMES)])
def test_nested(inner, outer, base):
    once = tuned(inner, BASES[base], 2)
    twice = tuned(outer, once, 4)
    y = jax.jit(lambda params: jpeft.apply(model, params, X))(twice)
    merged = jpeft.merge(twice)
    assert jax.tree.map(jnp.shape, merged) == SHAPES
    np.testing.assert_allclose(model(merged, X), y, rtol=2e-5, atol=2e-5 * np.abs(y).max())
    assert np.abs(y - jpeft.apply(model, once, X)).max() > 1e-3, "the outer method changes nothing"


def test_order():
    """What turns a kernel's inputs turns those of a term within it, and not of one around it."""
    turn_last = tuned("oft", tuned("lora", PARAMS, 2), 4)["up"]["kernel"]
    turn_first = tuned("lora", tuned("oft", PARAMS, 2), 4)["up"]["kernel"]
    w = PARAMS["up"]["kernel"]
    term = lambda node: node.scale * node.a @ node.b
    rotation = lambda node: node.replace(base=jnp.eye(16)).value()
    np.testing.assert_allclose(turn_last.value(), rotation(turn_last) @ (w + term(turn_last.base)), atol=1e-5)
    np.testing.assert_allclose(turn_first.value(), rotation(turn_first.base) @ w + term(turn_first), atol=1e-5)
