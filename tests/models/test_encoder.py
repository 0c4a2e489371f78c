"""The BERT encoder against transformers' on real weights, and its invariances on a small random one."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft import hf
from jpeft.models import Classifier, Embedder, Encoder, EncoderConfig, minilm_directory, stack_layers


FIXTURE = Path(__file__).parents[1] / "fixtures" / "minilm" / "encoder.npz"
TINY = EncoderConfig(
    vocab_size=31,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=24,
    max_position_embeddings=10,
)


@pytest.fixture(scope="module")
def minilm():
    try:
        return hf.load(minilm_directory())
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def expected():
    return dict(np.load(FIXTURE))


def inputs(expected):
    return expected["input_ids"], expected["attention_mask"], expected["token_type_ids"]


@pytest.fixture(scope="module")
def tiny(random_params):
    """Input ids, a mask with padding on the right, and parameters."""
    ids = jax.random.randint(jax.random.key(0), (2, 8), 0, TINY.vocab_size)
    mask = jnp.arange(8)[None] < jnp.array([[8], [5]])
    return ids, mask, random_params(Encoder(TINY), ids)


def encode(params, *args, **options):
    return jax.jit(Encoder(TINY, **options).apply)({"params": params}, *args)


def loss(params, ids, mask, **options):
    y = Encoder(TINY, **options).apply({"params": params}, ids, mask)
    return jnp.sum(jnp.sin(y.astype(jnp.float32)), where=mask[:, :, None])


def value_and_gradient(*args, **options):
    return jax.jit(jax.value_and_grad(partial(loss, **options)))(*args)


def encoder_of(minilm):
    """The config, and the parameters without the pooler's."""
    model, params, _ = minilm
    return model.config, {name: x for name, x in params.items() if name != "pooler"}


def test_parity_with_transformers(minilm, expected):
    model, params, _ = minilm
    y = jax.jit(model.apply)({"params": params}, *inputs(expected))
    kept = expected["attention_mask"].astype(bool)  # what stands at padding is nobody's, and rounds more coarsely
    np.testing.assert_allclose(y.last_hidden_state[kept], expected["last_hidden_state"][kept], atol=1e-5, rtol=0)
    np.testing.assert_allclose(y.pooler_output, expected["pooler_output"], atol=1e-5, rtol=0)


def test_cls_pooling_is_the_pooler_of_transformers(minilm, expected):
    config, encoder = encoder_of(minilm)
    d = config.hidden_size
    params = {"encoder": encoder, "pooler": minilm[1]["pooler"], "head": {"kernel": jnp.eye(d), "bias": jnp.zeros(d)}}
    logits = jax.jit(Classifier(config, d, "cls").apply)({"params": params}, *inputs(expected))
    np.testing.assert_allclose(logits, expected["pooler_output"], atol=1e-5, rtol=0)


def means(expected):
    lengths = expected["attention_mask"].sum(axis=1)
    return np.stack([x[:n].mean(axis=0) for x, n in zip(expected["last_hidden_state"], lengths, strict=True)])


def test_mean_pooling_takes_the_unmasked_tokens(minilm, expected):
    config, encoder = encoder_of(minilm)
    d = config.hidden_size
    params = {"encoder": stack_layers(encoder), "head": {"kernel": 2 * jnp.eye(d), "bias": jnp.ones(d)}}
    logits = jax.jit(Classifier(config, d, "mean", scan=True).apply)({"params": params}, *inputs(expected))
    np.testing.assert_allclose(logits, 2 * means(expected) + 1, atol=2e-5, rtol=0)


def test_embeddings_are_those_of_sentence_transformers(minilm, expected):
    config, encoder = encoder_of(minilm)
    embed = lambda *args, **options: Embedder(config, **options).apply({"params": {"encoder": encoder}}, *args)
    y = embed(*inputs(expected), normalize=True)
    np.testing.assert_allclose(y, means(expected) / np.linalg.norm(means(expected), axis=1)[:, None], atol=1e-5)
    first = embed(*inputs(expected), pooling="cls")
    np.testing.assert_allclose(first, expected["last_hidden_state"][:, 0], atol=1e-5)


def test_tokenizer_makes_the_ids_of_transformers(minilm, expected):
    tokenizer = minilm[2]
    tokenizer.no_padding()
    length = int(expected["attention_mask"][1].sum())
    assert tokenizer.encode("Hello", "world").ids == expected["input_ids"][1, :length].tolist()


@pytest.fixture(scope="module")
def plain(tiny):
    ids, mask, params = tiny
    return value_and_gradient(params, ids, mask)


@pytest.mark.parametrize(("scan", "remat"), [(False, True), (True, False), (True, True)])
def test_scan_and_remat_change_nothing(tiny, plain, scan, remat):
    ids, mask, params = tiny
    restack = stack_layers if scan else lambda tree: tree
    value, gradient = value_and_gradient(restack(params), ids, mask, scan=scan, remat=remat)
    assert all(jnp.linalg.norm(leaf) > 0 for leaf in jax.tree.leaves(gradient))
    forward = jax.make_jaxpr(Encoder(TINY, scan=scan, remat=remat).apply)({"params": restack(params)}, ids, mask)
    assert ("scan[" in str(forward), "remat2[" in str(forward)) == (scan, remat)
    np.testing.assert_allclose(value, plain[0], rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-5), gradient, restack(plain[1]))


def test_scanned_initialization_has_the_stacked_structure(tiny):
    ids, _, params = tiny
    scanned = jax.eval_shape(Encoder(TINY, scan=True).init, jax.random.key(0), ids)["params"]
    assert jax.tree.map(jnp.shape, scanned) == jax.tree.map(jnp.shape, stack_layers(params))


def test_padding_leaves_real_tokens_alone(tiny):
    ids, mask, params = tiny
    padded = encode(params, ids, mask)[1, :5]
    np.testing.assert_allclose(padded, encode(params, ids[1:, :5])[0], atol=2e-6)
    np.testing.assert_allclose(padded, encode(params, jnp.where(mask, ids, 7), mask.astype(int))[1, :5], atol=2e-6)
    assert not np.allclose(padded, encode(params, ids)[1, :5], atol=1e-3)  # the mask is at work


def test_a_row_of_padding_is_finite(tiny):
    ids, _, params = tiny
    head, mask = {"kernel": jnp.ones((16, 2)), "bias": jnp.zeros(2)}, jnp.array([[1] * 8, [0] * 8])
    one_layer = dataclasses.replace(TINY, num_hidden_layers=1)
    for model in (Classifier(one_layer, 2), Embedder(one_layer, normalize=True)):
        loss = lambda params, model=model: jnp.sum(model.apply({"params": params}, ids, mask))
        gradient = jax.jit(jax.grad(loss))({"encoder": params, "head": head})
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_positions_can_be_given(tiny):
    ids, mask, params = tiny
    default, positions = encode(params, ids, mask), jnp.arange(8)[None]
    np.testing.assert_allclose(encode(params, ids, mask, None, positions), default, atol=2e-6)
    assert not np.allclose(encode(params, ids, mask, None, positions + 1), default, atol=1e-3)


@pytest.mark.parametrize(("dtype", "param_dtype"), [(None, jnp.bfloat16), (jnp.bfloat16, jnp.float32)])
def test_bfloat16_under_strict_promotion(tiny, dtype, param_dtype):
    ids, mask, params = tiny
    exact = encode(params, ids, mask)
    params = jax.tree.map(lambda leaf: leaf.astype(param_dtype), params)
    options = {"dtype": dtype, "param_dtype": param_dtype}
    y = encode(params, ids, mask, **options)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.1)
    logits, variables = jax.eval_shape(Classifier(TINY, 3, **options).init_with_output, jax.random.key(0), ids, mask)
    gradient = jax.eval_shape(jax.grad(partial(loss, **options)), params, ids, mask)
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, gradient))} == {jnp.dtype(param_dtype)}


def test_a_sequence_too_long_is_refused(tiny):
    with pytest.raises(ValueError, match=r"11 tokens.* is 10"):
        Encoder(TINY).apply({"params": tiny[2]}, jnp.zeros((1, 11), jnp.int32))


@pytest.mark.parametrize("model", [Classifier(TINY, 2, "max"), Embedder(TINY, "max")])
def test_an_unknown_pooling_is_refused(tiny, model):
    with pytest.raises(ValueError, match="pooling='max'"):
        model.init(jax.random.key(0), tiny[0])


def test_types_of_tokens_where_there_are_none_are_refused(tiny):
    model = Encoder(dataclasses.replace(TINY, type_vocab_size=0, model_type="distilbert"))
    with pytest.raises(ValueError, match=r"distilbert.*token_type_ids"):
        model.init(jax.random.key(0), tiny[0], token_type_ids=tiny[0])


@pytest.mark.parametrize("changed", [{"hidden_act": "mish"}, {"pooler_act": "mish"}, {"num_attention_heads": 5}])
def test_config_refuses_by_name(changed):
    with pytest.raises(ValueError, match=next(iter(changed))):
        EncoderConfig(hidden_size=16, **changed)
