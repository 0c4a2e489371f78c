"""T5: greedy decoding as transformers does it, its cache, and its invariances."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jpeft import hf
from jpeft.models import T5, T5Config
from jpeft.models._t5_layers import _buckets


FIXTURES = Path(__file__).parents[1] / "fixtures" / "encoders"


def load(name, **options):
    """The model, its variables, what the encoder is called with, the labels, and the tokens of transformers."""
    model, params, _ = hf.load(FIXTURES / name, **options)
    arrays = np.load(FIXTURES / name / "expected.npz")
    inputs = {key: jnp.asarray(arrays[f"inputs/{key}"]) for key in ("input_ids", "attention_mask")}
    return model, {"params": params}, inputs, jnp.asarray(arrays["inputs/labels"]), arrays["tokens"]


@pytest.fixture(scope="module")
def t5():
    return load("t5")


@pytest.mark.parametrize(("name", "scan"), [("t5", False), ("t5", True), ("t5_gated", False)])
def test_64_greedy_tokens_are_those_of_transformers(name, scan):
    model, variables, inputs, _, expected = load(name, scan=scan)
    batch, count = expected.shape

    @jax.jit
    def decode(variables, inputs):
        start = jnp.full((batch, 1), model.config.decoder_start_token_id)
        y, cache = model.apply(variables, **inputs, decoder_input_ids=start, cache=model.init_cache(batch, count))

        def step(state, _):
            y, cache = state
            token = jnp.argmax(y[:, -1:], axis=-1)
            return model.apply(variables, decoder_input_ids=token, cache=cache), token[:, 0]

        return jax.lax.scan(step, (y, cache), length=count - 1)[1].T

    tokens = decode(variables, inputs)
    assert len(np.unique(tokens)) > 5  # it says something
    np.testing.assert_array_equal(tokens, expected[:, 1:])


@pytest.mark.parametrize("scan", [False, True])
def test_a_cache_changes_nothing(scan):
    """Of a first call of four tokens, and one of three, with padding on the left of a row and in the source."""
    model, variables, inputs, labels, _ = load("t5", scan=scan)
    ids, mask = model.shift_right(labels), jnp.ones((3, 7), jnp.int32).at[1, :2].set(0)
    expected = jax.jit(model.apply)(variables, **inputs, decoder_input_ids=ids, decoder_attention_mask=mask)

    @jax.jit
    def in_parts(variables):
        cache = model.init_cache(3, 9)
        part = lambda at, cache, **more: model.apply(
            variables, decoder_input_ids=ids[:, at], decoder_attention_mask=mask[:, at], cache=cache, **more
        )
        first, cache = part(slice(0, 4), cache, **inputs)
        second, cache = part(slice(4, 7), cache)
        return jnp.concatenate([first, second], axis=1), cache

    found, cache = in_parts(variables)
    assert cache.filled and cache.end == 7 and not cache.tokens.valid[:, 7:].any()
    kept = np.asarray(mask, bool)
    np.testing.assert_allclose(found[kept], expected[kept], atol=1e-5, rtol=1e-5)


def test_losses_are_cross_entropies_of_the_labels(t5):
    model, variables, inputs, labels, _ = t5
    logits = jax.jit(model.apply)(variables, **inputs, decoder_input_ids=model.shift_right(labels))
    losses = jax.jit(model.apply)(variables, **inputs, labels=labels)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    assert losses.shape == labels.shape and (labels == -100).any() and losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, jnp.where(labels == -100, 0.0, expected), atol=1e-5)


def test_scan_and_remat_leave_gradients_alone(t5):
    _, variables, inputs, labels, _ = t5

    def gradient(variables, **options):
        loss = lambda variables: jnp.sum(T5(t5[0].config, **options).apply(variables, **inputs, labels=labels))
        return jax.jit(jax.grad(loss))(variables)["params"]

    plain, other = gradient(variables), gradient(load("t5", scan=True)[1], scan=True, remat="dots")
    for stack in ("encoder", "decoder"):
        layers = other[stack].pop("layers")
        other[stack] |= {f"layers_{n}": jax.tree.map(lambda x, n=n: x[n], layers) for n in range(2)}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4, rtol=1e-4), other, plain)


@pytest.mark.parametrize(
    ("name", "dtype", "param_dtype"), [("t5", None, jnp.bfloat16), ("t5_gated", jnp.bfloat16, jnp.float32)]
)
def test_bfloat16_under_strict_promotion(name, dtype, param_dtype):
    model, variables, inputs, labels, _ = load(name)
    ids = model.shift_right(labels)
    exact = jax.jit(model.apply)(variables, **inputs, decoder_input_ids=ids)
    half = T5(model.config, dtype=dtype, param_dtype=param_dtype)
    variables = jax.tree.map(lambda x: x.astype(param_dtype), variables)
    y, cache = jax.jit(half.apply)(variables, **inputs, decoder_input_ids=ids, cache=half.init_cache(3, 8))
    assert y.dtype == jnp.float32 and cache.tokens.keys.dtype == cache.source.keys.dtype == jnp.bfloat16
    assert np.sqrt(np.mean((y - exact) ** 2)) < 0.05 * exact.std()
    shapes = jax.eval_shape(half.init, jax.random.key(0), **inputs, labels=labels)
    gradient = jax.eval_shape(jax.grad(lambda v: jnp.sum(half.apply(v, **inputs, labels=labels))), shapes)
    assert {x.dtype for x in jax.tree.leaves((shapes, gradient))} == {jnp.dtype(param_dtype)}
    later = jax.eval_shape(lambda cache: half.apply(variables, decoder_input_ids=ids[:, :1], cache=cache), cache)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), later[1]) == jax.tree.map(lambda x: (x.shape, x.dtype), cache)


def test_there_is_a_place_for_prompts_and_prefixes(t5):
    model, variables, inputs, labels, _ = t5
    seen = set()

    def note(call, args, kwargs, context):
        seen.add("/".join(context.module.path))
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(lambda: model.apply(variables, **inputs, labels=labels))
    assert seen >= {"encoder/embedded", "decoder/embedded", "encoder/layers_1/attention/kv"}
    assert seen >= {f"decoder/layers_0/{name}/kv" for name in ("attention", "cross_attention")}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"input_ids": ...}, "decoder_input_ids is missing"),
        ({"decoder_input_ids": ...}, "input_ids is missing"),
        ({"decoder_input_ids": ..., "cache": ...}, "input_ids is missing"),
        ({"input_ids": ..., "labels": ..., "decoder_attention_mask": "long"}, "mask is of 9 tokens"),
        ({"input_ids": ..., "labels": ..., "cache": ...}, "without it for labels"),
        ({"input_ids": ..., "decoder_input_ids": "long", "cache": ...}, "9 tokens do not fit a cache of 8"),
    ],
)
def test_arguments_that_make_no_call_are_refused(t5, arguments, match):
    model, variables, inputs, labels, _ = t5
    values = {"cache": model.init_cache(3, 8), "labels": labels, "decoder_input_ids": labels} | inputs
    long = {name: inputs["input_ids"] for name, x in arguments.items() if x == "long"}
    with pytest.raises(ValueError, match=match):
        model.apply(variables, **{name: values.get(name) for name in arguments} | long)


@pytest.mark.parametrize("changed", [{"feed_forward_proj": "mish"}, {"relative_attention_num_buckets": 6}])
def test_config_refuses_by_name(changed):
    with pytest.raises(ValueError, match=next(iter(changed))):
        T5Config(**changed)


def test_buckets_by_hand():
    """32 of them, up to a distance of 128: 16 on each side, 8 of single distances; or all 32 on one side."""
    both = lambda *distances: _buckets(T5Config(), jnp.array(distances), causal=False).tolist()
    assert both(0, -1, -7, -8, -11, -12, -127, -128, -999) == [0, 1, 7, 8, 8, 9, 15, 15, 15]
    assert both(1, 7, 8, 999) == [17, 23, 24, 31]
    causal = _buckets(T5Config(), jnp.array([0, -15, -16, -127, -999]), causal=True).tolist()
    assert causal == [0, 15, 16, 31, 31]
