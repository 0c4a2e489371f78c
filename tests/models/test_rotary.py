"""Rotations and their scalings against transformers', and what they are to do."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import jit

import jpeft.hf
from jpeft.hf.architectures import ARCHITECTURES
from jpeft.models import Decoder
from jpeft.models._rotary import Dynamic, Linear, Llama3, LongRope, Yarn, frequencies, rotate, rotation


FIXTURES = Path(__file__).parents[1] / "fixtures" / "decoders"
EXPECTED = dict(np.load(FIXTURES / "ropes.npz"))
PARAMETERS = json.loads(str(EXPECTED.pop("parameters")))


@pytest.fixture(scope="module")
def llama():
    """The parameters of a Llama, and a batch of 11 tokens."""
    _, params, _ = jpeft.hf.load(FIXTURES / "llama")
    batch = np.load(FIXTURES / "llama" / "expected.npz")
    return params, batch["right_ids"], batch["right_mask"], batch["right_logits"]


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_scaling_as_transformers_has_it(name, llama):
    params, ids, mask, unscaled = llama
    fields = json.loads((FIXTURES / "llama" / "config.json").read_text()) | {
        "rope_parameters": PARAMETERS[name],
        "max_position_embeddings": 8 if name == "dynamic" else 128,
    }
    model = ARCHITECTURES["llama"].build(fields)
    y = jit(model.apply)({"params": params}, ids, mask)
    kept = mask == 1
    np.testing.assert_allclose(y[kept], EXPECTED[name][kept], rtol=0, atol=1e-5)
    assert np.abs(y - unscaled)[kept].max() > 1e-3
    written = json.loads(json.dumps(ARCHITECTURES["llama"].fields(model)))
    assert ARCHITECTURES["llama"].build(written).config == model.config


def test_products_know_differences_of_positions_alone():
    x, y = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    turn = lambda x, position: rotate(x, rotation(jnp.array([[position]]), 1e4, 8))
    products = [jnp.sum(turn(x, a) * turn(y, b)) for a, b in [(0, 3), (4, 7), (100, 103)]]
    np.testing.assert_allclose(products, products[0], atol=1e-5)
    assert abs(jnp.sum(turn(x, 0) * turn(y, 4)) - products[0]) > 1e-2
    np.testing.assert_allclose(turn(x, 0), x)


def test_entries_beyond_the_width_stay():
    x = jax.random.normal(jax.random.key(0), (2, 3, 1, 8))
    y = rotate(x, rotation(jnp.arange(3)[None] + 1, 10.0, 6))
    np.testing.assert_array_equal(y[..., 6:], x[..., 6:])
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-6)
    assert (jnp.abs(y - x)[..., :6].max(axis=-1) > 1e-2).all()


def test_extremes_of_the_scalings():
    """Where a scaling has nothing to do it does nothing; where it acts in full it divides by its factor."""
    plain, length = frequencies(1e4, 16), jnp.float32(1)
    equal = lambda scaling, expected: np.testing.assert_allclose(scaling(1e4, 16, length)[0], expected, rtol=1e-6)
    equal(Linear(4.0), plain / 4)
    equal(Dynamic(4.0, max_position_embeddings=8), plain)
    equal(Llama3(4.0, 1e-9, 1e-8, 10**6), plain)
    equal(Llama3(4.0, 1e8, 1e9, 10), plain / 4)
    yarn, factor = Yarn(4.0, 10**9)(1e4, 16, length)
    np.testing.assert_allclose(yarn, plain, rtol=1e-6)
    assert factor == pytest.approx(0.1 * np.log(4) + 1)
    ones, twos = (1.0,) * 8, (2.0,) * 8
    equal(LongRope(ones, twos, 4.0, 8), plain)
    np.testing.assert_allclose(LongRope(ones, twos, 4.0, 8)(1e4, 16, jnp.float32(9))[0], plain / 2, rtol=1e-6)


def test_a_layer_without_rotations_does_not_see_positions(llama):
    params, ids, _, _ = llama
    config = jpeft.hf.load(FIXTURES / "llama")[0].config
    still = Decoder(dataclasses.replace(config, no_rope_layers=(0, 0)))
    run = jit(still.apply)
    y = run({"params": params}, ids, None, jnp.arange(11)[None])
    np.testing.assert_allclose(run({"params": params}, ids, None, 3 * jnp.arange(11)[None]), y, atol=1e-6)
    turning = jit(Decoder(dataclasses.replace(config, no_rope_layers=(1, 0))).apply)
    other = turning({"params": params}, ids, None, 3 * jnp.arange(11)[None])
    assert np.abs(other - y).max() > 1e-2
