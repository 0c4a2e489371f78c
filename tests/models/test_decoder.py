"""The decoder against transformers' Llama on small random weights, and its invariances."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from jpeft.models import Decoder, DecoderConfig, stack_layers


FIXTURES = Path(__file__).parents[1] / "fixtures" / "minilm"
NAMES = {
    "model.embed_tokens": "embed/embedding",
    "model.norm": "norm/scale",
    "lm_head": "lm_head/kernel",
    "self_attn.q_proj": "attention/query/kernel",
    "self_attn.k_proj": "attention/key/kernel",
    "self_attn.v_proj": "attention/value/kernel",
    "self_attn.o_proj": "attention/out/kernel",
    "mlp.gate_proj": "mlp/gate/kernel",
    "mlp.up_proj": "mlp/up/kernel",
    "mlp.down_proj": "mlp/down/kernel",
    "input_layernorm": "attention_norm/scale",
    "post_attention_layernorm": "mlp_norm/scale",
}


def config(tied):
    return DecoderConfig(48, 32, 56, 2, 4, 2, rope_theta=500.0, rms_norm_eps=1e-5, tie_word_embeddings=tied)


def fixture(tied):
    """Parameters, input ids, mask and logits, as transformers has them."""
    arrays, params = dict(np.load(FIXTURES / f"decoder_{'tied' if tied else 'untied'}.npz")), {}
    for name in [name for name in arrays if name.startswith("weights/")]:
        module, prefix = name.removeprefix("weights/").removesuffix(".weight"), ""
        if module.startswith("model.layers."):
            _, _, i, module = module.split(".", 3)
            prefix = f"layers_{i}/"
        path, weight = prefix + NAMES[module], arrays.pop(name)
        params[path] = jnp.asarray(weight.T if path.endswith("kernel") else weight)
    return unflatten_dict(params, sep="/"), arrays["input_ids"], arrays["attention_mask"], arrays["logits"]


@pytest.fixture(scope="module")
def untied():
    return fixture(tied=False)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_parity_with_transformers(tied, scan):
    params, ids, mask, expected = fixture(tied)
    model = Decoder(config(tied), scan)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    params = stack_layers(params) if scan else params
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)
    logits = jax.jit(model.apply)({"params": params}, ids, mask)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=1e-5)


def test_scan_and_remat_leave_gradients_alone(untied):
    params, ids, mask, _ = untied

    def gradient(params, **options):
        def loss(params):
            return jnp.sum(jnp.sin(Decoder(config(False), **options).apply({"params": params}, ids, mask)))

        return jax.jit(jax.grad(loss))(params)

    plain, other = gradient(params), gradient(stack_layers(params), scan=True, remat=True)
    assert all(jnp.linalg.norm(leaf) > 0 for leaf in jax.tree.leaves(plain))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4, rtol=1e-4), other, stack_layers(plain))


def test_a_token_sees_no_later_one(untied):
    params, ids, _, _ = untied
    apply, changed = jax.jit(Decoder(config(False)).apply), np.array(ids)
    changed[:, 6] = (changed[:, 6] + 1) % 48
    before, after = (apply({"params": params}, tokens) for tokens in (ids, changed))
    np.testing.assert_allclose(after[:, :6], before[:, :6], atol=1e-6)
    assert (jnp.abs(after[:, 6:] - before[:, 6:]).max(axis=-1) > 1e-3).all()


def test_left_padding_is_no_padding(untied):
    params, ids, _, _ = untied
    apply, variables = jax.jit(Decoder(config(False)).apply), {"params": params}
    plain = apply(variables, ids)
    padded = np.pad(ids, ((0, 0), (3, 0)))
    mask = np.pad(np.ones_like(ids), ((0, 0), (3, 0)))
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    np.testing.assert_allclose(apply(variables, padded, mask, positions)[:, 3:], plain, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(apply(variables, padded, mask)[:, 3:], plain, atol=1e-4, rtol=1e-4)
    assert not np.allclose(apply(variables, padded)[:, 3:], plain, atol=1e-2)  # the mask is at work


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dtype", "param_dtype"), [(None, jnp.bfloat16), (jnp.bfloat16, jnp.float32)])
def test_bfloat16_under_strict_promotion(tied, dtype, param_dtype):
    params, ids, mask, expected = fixture(tied)
    params = jax.tree.map(lambda leaf: leaf.astype(param_dtype), params)
    model = Decoder(config(tied), dtype=dtype, param_dtype=param_dtype)
    logits = jax.jit(model.apply)({"params": params}, ids, mask)
    assert logits.dtype == jnp.float32
    assert np.sqrt(np.mean((logits - expected) ** 2)) < 0.03 * expected.std()  # bfloat16 keeps 8 bits
    variables = jax.eval_shape(model.init, jax.random.key(0), ids)
    gradient = jax.eval_shape(jax.grad(lambda params: jnp.sum(model.apply(params, ids, mask))), variables)
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, gradient))} == {jnp.dtype(param_dtype)}


def test_every_kernel_is_a_matrix_without_a_bias(untied):
    leaves = flatten_dict(untied[0], sep="/")
    assert {leaf.ndim for path, leaf in leaves.items() if path.endswith("/kernel")} == {2}
    assert not [path for path in leaves if path.endswith("/bias")]


@pytest.mark.parametrize(("heads", "groups", "match"), [(3, 3, "hidden_size=32"), (4, 3, "num_key_value_heads=3")])
def test_config_refuses_heads_that_do_not_divide(heads, groups, match):
    with pytest.raises(ValueError, match=match):
        DecoderConfig(48, 32, 56, 2, heads, groups)
