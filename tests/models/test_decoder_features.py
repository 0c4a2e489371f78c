"""What every kind of decoder can do: losses, packing, scans over unlike layers, bfloat16, a place for prefixes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import jit

from jpeft.models import Decoder, DecoderConfig, _loss, stack_layers
from jpeft.models._attention import KeysAndValues, attend
from jpeft.models._experts import MixtureOfExperts


# Vocabulary, hidden, intermediate, layers, heads, groups.
SIZES = (48, 16, 24, 3, 4, 2)
CONFIGS = {
    "gemma": DecoderConfig(*SIZES, head_dim=6, hidden_act="gelu_pytorch_tanh", norm_offset=1.0, post_norms=True,
                           scale_embeddings=True, qk_norm=True, query_pre_attn_scalar=5, attn_logit_softcapping=5.0,
                           final_logit_softcapping=3.0, sliding_window=4, rope_local_base_freq=100.0,
                           layer_types=("sliding_attention", "full_attention", "sliding_attention"),
                           no_rope_layers=(1, 1, 0), tie_word_embeddings=True),
    "gpt2": DecoderConfig(*SIZES, learned_positions=True, max_position_embeddings=16, norm="layer", gated=False,
                          hidden_act="gelu_new", fused=True, attention_bias=True, mlp_bias=True),
    "experts": DecoderConfig(*SIZES, num_experts=4, num_experts_per_tok=2, attention_bias=True, fused=True),
}  # fmt: skip
LENGTH = 11


def close(x, y, tolerance=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance), x, y)


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def case(request, random_params):
    """A config, parameters, ids."""
    config = CONFIGS[request.param]
    ids = jax.random.randint(jax.random.key(0), (2, LENGTH), 0, 48)
    return config, jax.tree.map(lambda w: (w - 0.5) / 2 if w.ndim > 1 else w, random_params(Decoder(config), ids)), ids


def losses(model, params, ids, labels, **given):
    return jit(lambda params: model.apply({"params": params}, ids, labels=labels, **given))(params)


@pytest.fixture
def few(monkeypatch):
    """Few logits at a time: a part of the sequence is of three tokens."""
    monkeypatch.setattr(_loss, "LOGITS", 2 * 3 * 48 + 1)


def test_losses_are_the_cross_entropy_of_the_logits(case, few):
    config, params, ids = case
    labels = jnp.where(jnp.arange(LENGTH)[None] == 4, -100, ids).at[1, 8:].set(-100)
    found = losses(Decoder(config), params, ids, labels)
    assert (found.shape, found.dtype) == ((2, LENGTH), jnp.float32)
    logits = jit(Decoder(config).apply)({"params": params}, ids)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=-1)[..., 0]
    expected = jnp.pad(-chosen, [(0, 0), (1, 0)])
    close(found, jnp.where(labels == -100, 0, expected))
    assert ((found > 0) == (labels != -100).at[:, 0].set(False)).all()
    (lone,) = losses(Decoder(config), params, ids[:1, :1], labels[:1, :1])
    assert lone == 0


def test_gradients_of_losses_in_parts(case, few, monkeypatch):
    config, params, ids = case
    loss = lambda params: jnp.mean(Decoder(config).apply({"params": params}, ids, labels=ids))
    gradient = lambda: jit(jax.grad(lambda params: loss(params)))(params)
    parts = gradient()
    monkeypatch.setattr(_loss, "LOGITS", 2**30)
    close(parts, gradient())


def test_losses_never_hold_all_logits():
    """Of 8,192 tokens over 32,768 words the logits would take 1 GiB, and their gradient another."""
    model = Decoder(DecoderConfig(2**15, 8, 8, 1, 1, 1), remat="full")
    ids = jax.ShapeDtypeStruct((32, 256), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)
    step = jax.grad(lambda params, ids: jnp.mean(model.apply(params, ids, labels=ids)))
    memory = jax.jit(step).lower(params, ids).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 3 * 4 * _loss.LOGITS < 2**30


def test_packed_texts_are_texts_apart(case, few):
    config, params, ids = case
    model = Decoder(config)
    segments = jnp.array([[1] * 5 + [2] * 5 + [0], [3] * 5 + [4] * 5 + [0]])
    run = jit(model.apply)
    packed = run({"params": params}, ids, None, None, segments)
    together = losses(model, params, ids, ids, segment_ids=segments)
    texts = jnp.concatenate([ids[:, :5], ids[:, 5:10]])
    close(jnp.concatenate([packed[:, :5], packed[:, 5:10]]), run({"params": params}, texts))
    close(jnp.concatenate([together[:, :5], together[:, 5:10]]), losses(model, params, texts, texts))
    assert np.abs(packed - run({"params": params}, ids))[:, 5:].max() > 1e-2


def test_scanned_and_rematerialized_layers_are_layers(case):
    config, params, ids = case
    mask = jnp.ones_like(ids).at[1, :3].set(0)

    def value_and_gradient(params, **how):
        y = lambda params: Decoder(config, **how).apply({"params": params}, ids, mask)
        return jit(jax.value_and_grad(lambda params: jnp.mean(jnp.sin(y(params)))))(params)

    value, gradient = value_and_gradient(params)
    for remat in (None, "dots_no_batch"):
        close((value, stack_layers(gradient)), value_and_gradient(stack_layers(params), scan=True, remat=remat))
    close((value, gradient), value_and_gradient(params, remat="full"))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_what_rematerialization_keeps():
    config = CONFIGS["gpt2"]
    ids = jnp.zeros((2, LENGTH), jnp.int32)
    params = jax.eval_shape(Decoder(config).init, jax.random.key(0), ids)

    def products(remat):
        loss = lambda params: jnp.sum(Decoder(config, remat=remat).apply(params, ids))
        return str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general")

    assert products("full") == products(True) > products("dots_no_batch") > products("dots") >= products(None)
    with pytest.raises(ValueError, match="remat='all' is not supported; supported: None, 'full', 'dots'"):
        products("all")


@pytest.mark.parametrize(("dtype", "param_dtype"), [(None, jnp.bfloat16), (jnp.bfloat16, jnp.float32)])
def test_bfloat16(case, dtype, param_dtype):
    config, params, ids = case
    expected = jit(Decoder(config).apply)({"params": params}, ids)
    model = Decoder(config, scan=True, dtype=dtype, param_dtype=param_dtype)
    halves = jax.tree.map(lambda w: w.astype(param_dtype), stack_layers(params))
    y = jit(model.apply)({"params": halves}, ids)
    assert y.dtype == jnp.float32
    if not config.num_experts:  # rounding may pick another expert
        assert np.sqrt(np.mean((y - expected) ** 2)) < 0.06 * expected.std()  # bfloat16 keeps 8 bits
    gradients = jax.eval_shape(jax.grad(lambda p: jnp.sum(model.apply({"params": p}, ids, labels=ids))), halves)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(param_dtype)}
    initial = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), initial) == jax.tree.map(lambda x: (x.shape, x.dtype), halves)
    y, cache = jax.eval_shape(lambda p: model.apply(p, ids, cache=model.init_cache(2, LENGTH)), {"params": halves})
    assert (y.dtype, cache.keys.dtype) == (jnp.float32, jnp.bfloat16)


def test_experts_are_each_token_through_its_own():
    """Against the sum over all experts, weighed by zero where the router does not pick one."""
    layer = functools.partial(MixtureOfExperts, 5, 2, 6, jax.nn.silu)
    x = jax.random.normal(jax.random.key(0), (2, 7, 4))
    variables = jit(layer(normalize=False).init)(jax.random.key(1), x)

    def by_hand(params, normalize):
        p = jax.nn.softmax(x @ params["router"]["kernel"])
        p = jnp.where(p >= jnp.sort(p, axis=-1)[..., -2:-1], p, 0.0)
        p = p / jnp.sum(p, axis=-1, keepdims=True) if normalize else p
        gate, up = jnp.split(jnp.einsum("bsd,edw->bsew", x, params["experts"]["gate_up"]), 2, axis=-1)
        y = jnp.einsum("bsew,ewd->bsed", jax.nn.silu(gate) * up, params["experts"]["down"])
        return jnp.einsum("bse,bsed->bsd", p, y)

    for normalize in (False, True):
        expected = jit(functools.partial(by_hand, normalize=normalize))(variables["params"])
        close(jit(layer(normalize=normalize).apply)(variables, x), expected)


@pytest.mark.parametrize("cached", [False, True])
def test_what_stands_at_keys_and_values_is_attended_to(case, cached):
    """Two keys and values in front of the layers' own, put there by an interceptor."""
    config, params, ids = case
    model, seen = Decoder(config, scan=True), []

    def prefix(call, args, kwargs, context):
        if not isinstance(context.module, KeysAndValues):
            return call(*args, **kwargs)
        key, value, mask = args
        seen.append((context.module.path, key.shape, mask.shape))
        two = jnp.ones_like(key[:, :2])
        return jnp.concatenate([two, key], 1), jnp.concatenate([two, value], 1), jnp.pad(
            mask, [(0, 0)] * 3 + [(2, 0)], constant_values=True
        )

    def run(params):
        with nn.intercept_methods(prefix):
            if not cached:
                return model.apply({"params": params}, ids)
            first, cache = model.apply({"params": params}, ids[:, :6], cache=model.init_cache(2, 16))
            return jnp.concatenate([first, model.apply({"params": params}, ids[:, 6:], cache=cache)[0]], axis=1)

    plain = jit(model.apply)({"params": stack_layers(params)}, ids)
    y = jit(run)(stack_layers(params))
    assert y.shape == plain.shape
    assert np.abs(y - plain).max() > 1e-3
    keys = {16, 6} if cached else {LENGTH}
    assert {shape[1] for _, shape, _ in seen} == keys
    assert {path for path, _, _ in seen} == {("layers", "attention", "kv")}


def test_masks_are_true_where_seen_or_numbers_that_are_added():
    query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 5, 4, 8))
    key, value = key[:, :, :2], value[:, :, :2]
    seen = jnp.tril(jnp.ones((5, 5), bool))[None, None]
    y = attend(query, key, value, seen)
    close(attend(query, key, value, jnp.where(seen, 0.0, -1e30)), y)
    bias = jax.random.normal(jax.random.key(1), (1, 4, 5, 5))  # of every head its own
    scores = jnp.einsum("bqhw,bkhw->bhqk", query, jnp.repeat(key, 2, axis=2)) / np.sqrt(8) + bias
    weights = jax.nn.softmax(scores)
    close(attend(query, key, value, bias), jnp.einsum("bhqk,bkhw->bqhw", weights, jnp.repeat(value, 2, axis=2)))


def test_refusals(case):
    config, params, _ = case
    if config.learned_positions:
        with pytest.raises(ValueError, match="17 tokens, max_position_embeddings is 16"):
            Decoder(config).apply({"params": params}, jnp.zeros((1, 17), jnp.int32))
    with pytest.raises(ValueError, match=r"num_key_value_heads=3.*hidden_act='swiglu'.*layer_types has 1 entries"):
        DecoderConfig(*SIZES[:-1], 3, hidden_act="swiglu", layer_types=("full_attention",))
    with pytest.raises(ValueError, match=r"\['local'\] are not supported"):
        DecoderConfig(*SIZES, layer_types=("local",) * 3)
    with pytest.raises(ValueError, match="there is no sliding_window"):
        DecoderConfig(*SIZES, layer_types=("sliding_attention",) * 3)
    with pytest.raises(ValueError, match="num_experts_per_tok=2 is more than"):
        DecoderConfig(*SIZES, num_experts=1, num_experts_per_tok=2)
    with pytest.raises(ValueError, match="rotations pair entries: 3 of"):
        DecoderConfig(*SIZES, head_dim=3)
