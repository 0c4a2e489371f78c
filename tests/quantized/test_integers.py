"""Int8 and Int4 against the formula, and against qwix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.quantized._codes import unpack


@pytest.fixture
def qwix():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield pytest.importorskip("qwix")


def test_int8_by_hand():
    w = jnp.array([[1.0, -0.5], [-2.54, 0.25], [0.01, 1.27]])
    node = jpeft.int8({"kernel": w})["kernel"]
    np.testing.assert_array_equal(node.codes, [[50, -50], [-127, 25], [0, 127]])
    np.testing.assert_allclose(node.scale, [[0.02, 0.01]], rtol=1e-6)


def test_int4_by_hand():
    w = jnp.array([[0.7, 0.3], [-0.4, 1.5], [0.05, 0.0], [0.0, -0.12]])
    node = jpeft.int4({"kernel": w}, group=4)["kernel"]
    np.testing.assert_array_equal(unpack(node.codes, 1)[0].astype(jnp.int8) - 8, [[7, 1], [-4, 7], [0, 0], [0, -1]])
    np.testing.assert_allclose(node.scale, [[0.1, 1.5 / 7]], rtol=1e-6)
    node = jpeft.int4({"kernel": w}, group=4, symmetric=False)["kernel"]
    np.testing.assert_allclose(node.scale, [[1.1 / 15, 1.62 / 15]], rtol=1e-6)
    np.testing.assert_array_equal(node.zero, [[5, 1]])
    np.testing.assert_array_equal(unpack(node.codes, 1)[0], [[15, 4], [0, 15], [6, 1], [5, 0]])


def test_int4_reaches_both_ends():
    w = jnp.array([[-8.0, 7.0], [1.0, -1.0]])
    node = jpeft.int4({"kernel": w}, group=2)["kernel"]
    np.testing.assert_array_equal(node.value(), w)
    np.testing.assert_array_equal(unpack(node.codes, 1)[0], [[0, 15], [9, 7]])


def test_int8_is_that_of_qwix(qwix, normal):
    w = normal(128, 96)
    how = {"calibration_method": f"absmax,{127.5 / 127}"}  # it spreads 127.5 steps over the greatest weight, not 127
    for group, tiles in [(None, {}), (32, {0: 32})]:
        want = qwix.quantize(w, jnp.int8, channelwise_axes=[1], tiled_axes=tiles, **how)
        got = jpeft.int8({"kernel": w}, group=group)["kernel"]
        np.testing.assert_array_equal(got.codes, want.qvalue)
        np.testing.assert_allclose(got.value(), qwix.dequantize(want), rtol=1e-6, atol=0)


def test_asymmetric_int4_is_that_of_qwix(qwix, normal):
    w = normal(128, 96) + 0.5
    want = qwix.quantize(w, jnp.int4, channelwise_axes=[1], tiled_axes={0: 32}, calibration_method="minmax")
    got = jpeft.int4({"kernel": w}, group=32, symmetric=False)["kernel"]
    np.testing.assert_allclose(got.value(), qwix.dequantize(want), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(unpack(got.codes, 4).reshape(128, 96), want.qvalue.astype(jnp.int32) + 8)
