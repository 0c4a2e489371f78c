"""Decoding with a cache is decoding without, however the tokens are divided and wherever there is padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import jit

from jpeft.models import Decoder, DecoderConfig, stack_layers


SIZES = (48, 16, 24, 2, 4, 2)  # vocabulary, hidden, intermediate, layers, heads, groups
CONFIGS = {
    "llama": DecoderConfig(*SIZES),
    "windows": DecoderConfig(*SIZES, layer_types=("sliding_attention", "full_attention"), sliding_window=4,
                             rope_local_base_freq=100.0),
    "positions": DecoderConfig(*SIZES, learned_positions=True, max_position_embeddings=16, norm="layer", gated=False,
                               fused=True, attention_bias=True, tie_word_embeddings=True),
    "experts": DecoderConfig(*SIZES, num_experts=4, num_experts_per_tok=2),
}  # fmt: skip
LENGTH = 12


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def case(request, random_params):
    """A model, its parameters, ids, and their logits without a cache."""
    model, ids = Decoder(CONFIGS[request.param]), jax.random.randint(jax.random.key(0), (2, LENGTH), 0, 48)
    params = jax.tree.map(lambda w: w - 0.5 if w.ndim > 1 else w, random_params(model, ids))
    return model, {"params": params}, ids, jit(model.apply)({"params": params}, ids)


def decode(model, variables, ids, parts, cache):
    """The logits of ids that come in parts, and the cache after them."""
    run, logits = jit(lambda variables, ids, cache: model.apply(variables, ids, cache=cache)), []
    for part in jnp.split(ids, np.cumsum(parts)[:-1], axis=1):
        y, cache = run(variables, part, cache)
        logits.append(y)
    return jnp.concatenate(logits, axis=1), cache


@pytest.mark.parametrize("parts", [[5, 1, 6], [1] * 12], ids=["in parts", "one by one"])
def test_cache_is_no_cache(case, parts):
    model, variables, ids, expected = case
    y, cache = decode(model, variables, ids, parts, model.init_cache(2, 16))
    np.testing.assert_allclose(y, expected, atol=1e-5, rtol=1e-5)
    assert cache.filled
    assert cache.end == LENGTH
    np.testing.assert_array_equal(cache.positions[:, :LENGTH], np.tile(np.arange(LENGTH), (2, 1)))
    np.testing.assert_array_equal(cache.valid, np.tile(np.arange(16) < LENGTH, (2, 1)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_the_prompt_is_not_seen_later(case, side):
    """The second text is two tokens shorter: what comes after it is as if it stood alone."""
    model, variables, ids, expected = case
    kept = slice(2, 7) if side == "left" else slice(0, 5)
    mask = jnp.ones((2, 7), jnp.int32).at[1].set(0).at[1, kept].set(1)
    after = jnp.array([[7], [5]]) + jnp.arange(5)[None]

    @jit
    def run(variables, ids):
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        _, cache = model.apply(variables, ids[:, :7], mask, positions, cache=model.init_cache(2, 14))
        return model.apply(variables, ids[:, 7:], None, after, cache=cache)[0]

    y = run(variables, ids)
    np.testing.assert_allclose(y[0], expected[0, 7:], atol=1e-5, rtol=1e-5)
    alone = jit(model.apply)(variables, jnp.concatenate([ids[1:, kept], ids[1:, 7:]], axis=1))
    np.testing.assert_allclose(y[1], alone[0, 5:], atol=1e-5, rtol=1e-5)


def test_layers_scanned_over_a_cache(case):
    model, variables, ids, expected = case
    scanned = Decoder(model.config, scan=True, remat="full")
    stacked = {"params": stack_layers(variables["params"])}
    y, cache = decode(scanned, stacked, ids, [5, 7], scanned.init_cache(2, LENGTH))
    np.testing.assert_allclose(y, expected, atol=1e-5, rtol=1e-5)
    assert not (cache.keys == 0).all(axis=(1, 2, 3, 4)).any()


def test_caches_of_another_type(case):
    model, variables, ids, expected = case
    y, cache = decode(model, variables, ids, [6, 6], model.init_cache(2, LENGTH, jnp.bfloat16))
    assert {cache.keys.dtype, cache.values.dtype} == {jnp.dtype(jnp.bfloat16)}
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y[:, :6], expected[:, :6], atol=1e-5, rtol=1e-5)  # the first call uses no slots
    error = np.sqrt(np.mean((y - expected)[:, 6:] ** 2))
    assert 0 < error < 0.03 * expected.std()
    assert Decoder(model.config, dtype=jnp.bfloat16).init_cache(1, 1).keys.dtype == jnp.bfloat16


def test_refusals(case):
    model, variables, ids, _ = case
    with pytest.raises(ValueError, match="12 tokens do not fit a cache of 11 slots"):
        model.apply(variables, ids, cache=model.init_cache(2, 11))
    with pytest.raises(ValueError, match="mask is of 12 tokens, and the call of 1"):
        model.apply(variables, ids[:, :1], jnp.ones_like(ids), cache=model.init_cache(2, 12))
    for name in ("labels", "segment_ids"):
        with pytest.raises(ValueError, match="cache goes with neither"):
            model.apply(variables, ids, cache=model.init_cache(2, 12), **{name: ids})


def test_the_cache_is_updated_in_place():
    """A step of a scanned model needs no second cache: memory beyond the arguments is small."""
    model = Decoder(DecoderConfig(48, 16, 24, 4, 4, 2), scan=True)
    ids = jnp.zeros((2, 1), jnp.int32)
    cache = jax.eval_shape(lambda: model.init_cache(2, 4096)).replace(filled=True)
    variables = jax.eval_shape(model.init, jax.random.key(0), ids)
    step = jax.jit(lambda cache, variables: model.apply(variables, ids, cache=cache), donate_argnums=0)
    memory = step.lower(cache, variables).compile().memory_analysis()
    size = 2 * cache.keys.size * 4
    assert memory.temp_size_in_bytes < size / 2
