"""NF4 against the algorithm of bitsandbytes, its own output, and qwix."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

import jpeft
from jpeft.quantized._codes import unpack
from jpeft.quantized._nf4 import DYNAMIC, LEVELS, lookup


def torch_codes(node):
    """The codes of a node in the order of the torch weight `(out, in)`, flattened."""
    return np.asarray(unpack(node.codes, len(node.absmax))).reshape(-1, node.codes.shape[1]).T.reshape(-1)


def dynamic_map():
    """`create_dynamic_map()` of bitsandbytes: signed, 7 bits of exponent, 8 bits."""
    data = [0.0, 1.0]
    for i in range(7):
        boundaries = np.linspace(0.1, 1, 2**i + 1)
        means = 10.0 ** (i - 6) * (boundaries[:-1] + boundaries[1:]) / 2
        data += [*means, *-means]
    return np.sort(np.float32(data))


def closest(x, table):
    return np.abs(x[:, None] - table[None]).argmin(axis=1)


def bitsandbytes(w):
    """`quantize_4bit(w, compress_statistics=True, quant_type="nf4")` and back, for a torch weight `(out, in)`."""
    blocks = w.reshape(-1, 64)
    absmax = np.abs(blocks).max(axis=1)
    codes = closest((blocks * (1 / absmax)[:, None]).reshape(-1), LEVELS)
    offset = absmax.mean()
    table, nested = dynamic_map(), absmax - offset
    scales = np.float32([np.abs(nested[n : n + 256]).max() for n in range(0, len(nested), 256)])
    of = scales[np.arange(len(nested)) // 256]
    inner = closest(nested * (1 / of), table)
    restored = (table[inner] * of + offset)[:, None] * LEVELS[codes].reshape(-1, 64)
    return codes, inner, scales, offset, restored.reshape(w.shape)


def test_levels():
    # Appendix E: quantiles of N(0, 1), 8 on the negative side and 9 on the positive one, which share zero
    offset = 0.9677083
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    want = np.sort(np.concatenate([positive, negative, [0]])) / positive.max()
    np.testing.assert_allclose(LEVELS, want, atol=2e-7)
    np.testing.assert_array_equal(LEVELS[[0, 7, 15]], [-1, 0, 1])


def test_levels_of_the_constants():
    np.testing.assert_array_max_ulp(DYNAMIC, dynamic_map(), maxulp=1)
    assert len(DYNAMIC) == 256 and np.all(np.diff(DYNAMIC) > 0)


@pytest.mark.parametrize("shape", [(128, 96), (192, 100)])
def test_codes_and_constants_are_those_of_bitsandbytes(normal, shape):
    w = 0.02 * normal(*shape)
    node = jpeft.nf4({"kernel": w})["kernel"]
    codes, inner, scales, offset, restored = bitsandbytes(np.asarray(w).T)
    np.testing.assert_array_equal(torch_codes(node), codes)
    np.testing.assert_array_equal(np.asarray(node.absmax).T.reshape(-1), inner)
    np.testing.assert_allclose(node.scale, scales, rtol=1e-6)
    np.testing.assert_allclose(node.mean, offset, rtol=1e-6)
    np.testing.assert_allclose(node.value(), restored.T, rtol=1e-5, atol=0)


def test_output_of_bitsandbytes():
    """What bitsandbytes 0.50.2 makes of these weights, as checksums.

    Without compressed statistics: that release finds the nearest of 256 levels on a CPU by a coarse table.
    """
    i, j = np.indices((384, 96))
    w = np.float32((i * 7919 + j * 104729) % 10007 / 10007 - 0.5)
    node = jpeft.nf4({"kernel": jnp.asarray(w)}, double=False)["kernel"]
    high, low = torch_codes(node).reshape(-1, 2).T  # it keeps neighbours in a byte
    assert zlib.crc32((high << 4 | low).tobytes()) == 3512049762
    assert zlib.crc32(np.asarray(node.value()).T.tobytes()) == 2040104963


def test_error_with_quantized_constants(normal):
    w = normal(1024, 2048)
    node, single = (jpeft.nf4({"kernel": w}, double=double)["kernel"] for double in (True, False))
    np.testing.assert_array_equal(node.codes, single.codes)
    drift = np.abs(np.asarray(node.constants()) - np.asarray(single.absmax))
    assert 0 < drift.max() < 0.5 * 0.0141 * np.asarray(node.scale).max()  # half the widest gap of the 256 levels
    assert np.sqrt(np.mean((node.value() - w) ** 2)) == pytest.approx(0.0920, abs=2e-4)


@pytest.mark.parametrize("shape", [(512, 512), (384, 1536)])
def test_bits_in_all(shape):
    node = jpeft.nf4({"kernel": jnp.ones(shape)})["kernel"]
    assert 8 * sum(x.nbytes for x in jax.tree.leaves(node)) / (shape[0] * shape[1]) < 4.13


def test_rounding_again_keeps_the_codes(normal):
    once = jpeft.nf4({"kernel": normal(128, 96)})["kernel"]
    again = jpeft.nf4({"kernel": once.value()})["kernel"]
    np.testing.assert_array_equal(again.codes, once.codes)
    np.testing.assert_allclose(again.constants(), once.constants(), rtol=0, atol=0.5 * 0.0141 * float(once.scale[0]))


def test_it_is_that_of_qwix(normal):
    qwix = pytest.importorskip("qwix")
    w = normal(128, 96)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        want = qwix.quantize(w, "nf4", channelwise_axes=[1], tiled_axes={0: 64})
        restored = qwix.dequantize(want)
    node = jpeft.nf4({"kernel": w}, double=False)["kernel"]
    np.testing.assert_array_equal(torch_codes(node), np.asarray(want.qvalue.astype(jnp.uint8)).T.reshape(-1))
    np.testing.assert_array_equal(node.value(), restored)


def test_lookup_is_a_lookup():
    codes = jnp.arange(16, dtype=jnp.uint8).reshape(1, 16, 1)
    for fn in (lookup, jax.jit(lookup), jax.vmap(lookup), lambda c: jax.lax.map(lookup, c)):
        np.testing.assert_array_equal(fn(codes).reshape(-1), LEVELS)
    assert jax.eval_shape(lookup, codes).dtype == jnp.float32


@pytest.mark.parametrize(("platform", "gathers"), [("cpu", False), ("tpu", False), ("cuda", True)])
def test_lookup_by_platform(platform, gathers):
    codes = jax.ShapeDtypeStruct((2, 64, 8), jnp.uint8)
    text = jax.jit(lookup).trace(codes).lower(lowering_platforms=(platform,)).as_text()
    assert ("gather" in text) == gathers
    assert "select" in text or gathers
