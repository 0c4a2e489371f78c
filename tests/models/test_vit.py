"""The vision transformer: its invariances, and what it refuses."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft import hf
from jpeft.models import ViT, ViTConfig


FIXTURE = Path(__file__).parents[1] / "fixtures" / "encoders" / "vit_classification"


@pytest.fixture(scope="module")
def vit():
    """The model, its parameters, images and the logits of transformers."""
    model, params, _ = hf.load(FIXTURE)
    arrays = np.load(FIXTURE / "expected.npz")
    return model, params, jnp.asarray(arrays["inputs/pixel_values"]), arrays["outputs/logits"]


def test_scan_and_remat_change_nothing(vit):
    model, params, images, expected = vit
    logits = jax.jit(ViT(model.config, 3, scan=True).apply)({"params": hf.load(FIXTURE, scan=True)[1]}, images)
    np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=1e-5)

    def gradient(remat):
        loss = lambda params: jnp.sum(jnp.sin(ViT(model.config, 3, remat=remat).apply({"params": params}, images)))
        return jax.jit(jax.grad(loss))(params)

    plain, other = gradient(None), gradient("full")
    assert all(jnp.abs(x).max() > 0 for x in jax.tree.leaves(plain))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6, rtol=1e-5), other, plain)


def test_patches_are_read_row_by_row(vit):
    """The hidden state of a patch changes with its pixels most, and positions belong to patches in this order."""
    config, params, images = vit[0].config, vit[1], vit[2]
    model = ViT(ViTConfig(**{**vars(config), "num_hidden_layers": 0}))
    encode = jax.jit(lambda images: model.apply({"params": params}, images))
    plain = encode(images)
    for patch, (row, column) in enumerate(((0, 0), (0, 6), (4, 0), (4, 6)), start=1):
        changed = encode(images.at[:, :, row + 3, column + 5].add(1.0))
        moved = jnp.abs(changed - plain).max(axis=(0, 2)) > 1e-4
        assert jnp.flatnonzero(moved).tolist() == [patch]


@pytest.mark.parametrize(("dtype", "param_dtype"), [(None, jnp.bfloat16), (jnp.bfloat16, jnp.float32)])
def test_bfloat16_under_strict_promotion(vit, dtype, param_dtype):
    model, params, images, expected = vit
    half = ViT(model.config, 3, dtype=dtype, param_dtype=param_dtype)
    params = jax.tree.map(lambda x: x.astype(param_dtype), params)
    logits = jax.jit(half.apply)({"params": params}, images)
    assert logits.dtype == jnp.float32
    assert np.sqrt(np.mean((logits - expected) ** 2)) < 0.05 * expected.std()
    shapes = jax.eval_shape(half.init, jax.random.key(0), images)
    gradient = jax.eval_shape(jax.grad(lambda variables: jnp.sum(half.apply(variables, images))), shapes)
    assert {x.dtype for x in jax.tree.leaves((shapes, gradient))} == {jnp.dtype(param_dtype)}
    bare = ViT(model.config, dtype=dtype, param_dtype=param_dtype, add_pooling_layer=True)
    y = jax.eval_shape(bare.init_with_output, jax.random.key(0), images)[0]
    assert y.last_hidden_state.dtype == y.pooler_output.dtype == jnp.bfloat16


@pytest.mark.parametrize("shape", [(2, 3, 12, 8), (2, 3, 16, 24), (2, 1, 8, 12), (2, 8, 12, 3)])
def test_images_of_another_size_are_refused(vit, shape):
    with pytest.raises(ValueError, match=r"expected \('batch', 3, 8, 12\)(?s:.)*resize the images"):
        vit[0].apply({"params": vit[1]}, jnp.zeros(shape))


@pytest.mark.parametrize("changed", [{"hidden_act": "mish"}, {"num_attention_heads": 5}, {"image_size": (224, 225)}])
def test_config_refuses_by_name(changed):
    with pytest.raises(ValueError, match=next(iter(changed))):
        ViTConfig(**changed)
