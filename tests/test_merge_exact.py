"""Merging rounds once and takes nothing away: the tuned tree still has its base, bit by bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jpeft
from jpeft._node import cast, value
from jpeft._tree import map_nodes
from jpeft.testing import shaken


METHODS = {
    "lora": jpeft.lora(rank=3, alpha=6),
    "dora": jpeft.dora(rank=3, alpha=6),
    "vera": jpeft.vera(rank=4),
    "loha": jpeft.loha(rank=2),
    "lokr": jpeft.lokr(rank=2),
    "hira": jpeft.hira(rank=3),
    "delora": jpeft.delora(rank=3),
    "miss": jpeft.miss(rank=4),
    "oft": jpeft.oft(block=4),
    "hra": jpeft.hra(rank=2),
    "delta": jpeft.delta(),
    "spiel": jpeft.spiel(density=0.3),
    "lora_on_lora": jpeft.chain(jpeft.lora(rank=2), jpeft.lora(rank=3)),
}
DTYPES = ("float32", "bfloat16", "float16")
QUANTIZERS = {"int8": jpeft.int8, "nf4": jpeft.nf4(block=8)}
FORMS = [*((dtype, None) for dtype in DTYPES), *(("float32", name) for name in QUANTIZERS)]


def bits(tree):
    return [(jax.tree_util.keystr(path), str(x.dtype), np.asarray(x).tobytes())
            for path, x in jax.tree_util.tree_leaves_with_path(tree)]  # fmt: skip


def made(method, form, seed, size):
    """A base, and a tree over it whose method has trained so far that its arrays moved by about `size`."""
    dtype, quantizer = form
    kernel = jax.random.normal(jax.random.key(seed), (16, 8)).astype(dtype)
    base = {"dense": {"kernel": kernel, "bias": kernel[0]}}
    base = QUANTIZERS[quantizer](base) if quantizer else base
    tuned = METHODS[method](base, key=jax.random.key(seed + 1))
    trainable, frozen = jpeft.partition(tuned)
    return base, jpeft.combine(shaken(trainable, jax.random.key(seed + 2), size), frozen)


def exact(tuned):
    """What `merge` should give, in float64, over the kernel as it is in the base."""
    plain = lambda x: x if isinstance(x.base, jpeft.Reparam) else x.replace(base=value(x.base))
    with jax.enable_x64(True):
        return np.asarray(jpeft.merge(cast(map_nodes(plain, tuned, jpeft.Reparam), jnp.float64))["dense"]["kernel"])


def ulp(x, dtype):
    """The distance to the next number, in an array of the dtype."""
    info = jnp.finfo(dtype)
    exponent = np.floor(np.log2(np.maximum(np.abs(x), float(info.tiny))))
    return 2.0 ** (exponent - info.nmant)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(list(METHODS)), st.sampled_from(FORMS), st.integers(0, 1000), st.sampled_from([1e-3, 0.1, 1.0]))
def test_merging_is_exact_and_takes_nothing_away(method, form, seed, size):
    """Within an ulp of an entry, or four of the largest in float32, in which sums, products and norms are formed."""
    base, tuned = made(method, form, seed, size)
    before = bits(tuned)
    merged = jpeft.merge(tuned)["dense"]["kernel"]
    assert bits(tuned) == before
    assert bits(jpeft.strip(tuned)) == bits(base)
    expected = exact(tuned)
    limit = np.maximum(ulp(expected, merged.dtype), 4 * ulp(np.abs(expected).max(), "float32"))
    error = np.abs(np.asarray(merged, np.float64) - expected)
    assert merged.dtype == form[0]
    assert (error <= limit).all(), f"{(error / limit).max():.1f} of the limit"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_term_of_low_rank_by_hand(dtype):
    """W + s A B in NumPy's float64. In float32 it is formed with five roundings, and cast by one more, to nearest."""
    base, tuned = made("lora", (dtype, None), 5, 0.1)
    node = tuned["dense"]["kernel"]
    w, a, b = (np.asarray(x, np.float64) for x in (node.base, node.a, node.b))
    expected = w + 2.0 * a @ b
    found = np.asarray(jpeft.merge(tuned)["dense"]["kernel"], np.float64)
    formed = 5 * 2.0**-24 * (np.abs(w) + 2.0 * np.abs(a) @ np.abs(b))
    assert (np.abs(found - expected) <= formed + (dtype != "float32") * ulp(expected, dtype) / 2).all()
    assert bits(jpeft.strip(tuned)) == bits(base)


def test_subtracting_does_not_undo():
    """Why the tree is kept: W + D - D is another kernel, in float32 and the more in bfloat16."""
    for dtype in ("float32", "bfloat16"):
        base, tuned = made("lora", (dtype, None), 5, 1.0)
        node = tuned["dense"]["kernel"]
        change = (2.0 * node.a @ node.b).astype(dtype)
        undone = jpeft.merge(tuned)["dense"]["kernel"] - change
        assert (undone != base["dense"]["kernel"]).any()
