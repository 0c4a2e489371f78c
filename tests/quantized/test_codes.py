"""What holds for every format."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formats import NF4
from hypothesis import given, settings
from hypothesis import strategies as st

import jpeft
from jpeft._kernel import fold
from jpeft.quantized._codes import pack, unpack


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([(1, 2, 1), (3, 4, 5), (2, 64, 7)]), st.integers(0, 2**32 - 1))
def test_two_codes_a_byte(shape, seed):
    codes = np.random.default_rng(seed).integers(0, 16, shape, np.uint8)
    packed = np.asarray(pack(jnp.asarray(codes)))
    assert packed.dtype == np.uint8
    low, high = np.split(codes, 2, axis=1)
    np.testing.assert_array_equal(packed, (low + 16 * high).reshape(-1, shape[2]))
    np.testing.assert_array_equal(unpack(jnp.asarray(packed), shape[0]), codes)


@pytest.mark.parametrize("shape", [(512, 512), (384, 1536)])
def test_bits(form, shape):
    arrays = jax.tree.leaves(form.node(jnp.ones(shape, jnp.bfloat16)))
    assert {x.dtype.name for x in arrays} <= {"int8", "uint8", "float32"}  # what every checkpoint can hold
    once = sum(x.nbytes for x in arrays if x.ndim == 0)  # the mean of double quantization
    assert 8 * (sum(x.nbytes for x in arrays) - once) == form.bits(shape[0]) * shape[0] * shape[1]
    assert once <= 4


def test_error_is_at_most_half_a_gap(exact, normal):
    w = normal(128, 96)
    groups = np.asarray(w).reshape(-1, exact.group or 128, 96)
    bound = exact.half_gap(groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True))
    error = np.abs(np.asarray(exact.node(w).value()).reshape(groups.shape) - groups)
    assert 0.9 < np.max(error / bound) < 1 + 1e-4


def test_rounding_again_changes_nothing(exact, normal):
    once = exact.node(normal(128, 96))
    again = exact.node(once.value())
    np.testing.assert_array_equal(again.codes, once.codes)
    np.testing.assert_allclose(again.value(), once.value(), rtol=1e-6, atol=0)


def matrices_one_by_one(form, w, axes):
    """The value of a kernel, of which every matrix is quantized by itself; folded."""
    matrices = fold(w, axes)
    each = [form.node(m).value() for m in matrices.reshape(-1, *matrices.shape[-2:])]
    return jnp.stack(each).reshape(matrices.shape)


def test_a_stack_is_its_matrices(form, normal):
    w = normal(64, 3, 6)
    got = form.node(w, "iso").value()
    assert got.shape == w.shape
    np.testing.assert_allclose(fold(got, "iso"), matrices_one_by_one(form, w, "iso"), rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("axes", "shape"),
    [("sio", (3, 64, 6)), ("ioo", (64, 2, 3)), ("iio", (2, 32, 6)), ("oi", (6, 64))],
)
def test_any_kernel_is_its_matrices(normal, axes, shape):
    w = normal(*shape)
    got = NF4.node(w, axes).value()
    assert got.shape == shape
    np.testing.assert_allclose(fold(got, axes), matrices_one_by_one(NF4, w, axes), rtol=2e-6, atol=0)


def test_a_layer_of_a_stack(form, normal):
    w = normal(64, 3, 6)
    layer = form.node(w, "iso").take(lambda x, axis: jnp.take(x, 1, axis=axis), 1, True)
    np.testing.assert_allclose(layer.value(), form.node(w[:, 1]).value(), rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("long", "short"),
    [
        (jpeft.int4(), jpeft.int4(group=36)),
        (jpeft.nf4(double=False), jpeft.nf4(block=36, double=False)),
    ],
    ids=["int4", "nf4"],
)
def test_an_incomplete_group_is_a_shorter_group(normal, long, short):
    w = normal(100, 6)
    node = long({"kernel": w})["kernel"]
    assert node.value().shape == w.shape
    np.testing.assert_array_equal(node.value()[64:], short({"kernel": w[64:]})["kernel"].value())
    assert node.codes.shape == (64, 6)  # two groups: the second is stored filled up


def test_zero_stays_zero(form, normal):
    w = normal(128, 96).at[:, 0].set(0.0).at[:64, 1].set(0.0)
    got = form.node(w).value()
    assert jnp.all(jnp.isfinite(got))
    assert not jnp.any(got[:, 0]) and not jnp.any(got[:64, 1])
    assert not jnp.any(form.node(jnp.zeros_like(w)).value())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_does_not_vanish(node_class, normal, bad):
    got = node_class.node(normal(128, 96).at[3, 2].set(bad)).value()
    assert jnp.isnan(got[3, 2])
    assert node_class is NF4 or jnp.all(jnp.isfinite(got[:, 3]))  # the constants of NF4 share a mean


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtype_is_kept(node_class, normal, dtype):
    w = normal(128, 96).astype(dtype)
    node = node_class.node(w)
    assert node.value().dtype == jpeft.merge({"kernel": node})["kernel"].dtype == dtype
    exact = node_class.node(w.astype(jnp.float32)).value()
    np.testing.assert_array_equal(node.value(), exact.astype(dtype))  # rounded once, at the end


def test_frozen_and_compiled(node_class, normal):
    params = {"kernel": normal(128, 96)}
    node = node_class.quantize(params)
    assert set(jax.tree.leaves(jpeft.labels(node))) == {"frozen"}
    compiled = jax.jit(node_class.quantize)(params)["kernel"]
    np.testing.assert_allclose(jax.jit(lambda n: n.value())(compiled), node["kernel"].value(), rtol=2e-6, atol=0)
    assert type(jpeft.strip(jpeft.lora(node, rank=2))["kernel"]) is type(node["kernel"])


def test_refusals(normal):
    params = {"kernel": normal(64, 6)}
    with pytest.raises(ValueError, match="even, not 7"):
        jpeft.int4(params, group=7)
    with pytest.raises(ValueError, match="at least one weight, not 0"):
        jpeft.int8(params, group=0)
    with pytest.raises(ValueError, match=": LoRA"):
        jpeft.nf4(jpeft.lora(params, rank=2))
    with pytest.raises(TypeError, match="groups"):
        jpeft.nf4(groups=64)


def test_options_by_pattern(normal):
    params = {"a": {"kernel": normal(64, 6)}, "b": {"kernel": normal(64, 6)}}
    params = jpeft.int4(params, group={"a/.*": 16, ".*": 32})
    assert [len(params[k]["kernel"].scale) for k in "ab"] == [4, 2]
