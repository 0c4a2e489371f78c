"""Every decoder against transformers, on small random checkpoints that it has saved."""

import functools
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import jit

import jpeft.hf


FIXTURES = Path(__file__).parents[1] / "fixtures" / "decoders"
NAMES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
SIDES = ("right", "left")

every = pytest.mark.parametrize("name", NAMES)


@functools.cache
def checkpoint(name):
    """The model, its parameters, and what transformers computes with it."""
    model, params, _ = jpeft.hf.load(FIXTURES / name, scan=name != "llama")
    return model, params, dict(np.load(FIXTURES / name / "expected.npz"))


@every
def test_logits(name):
    model, params, expected = checkpoint(name)
    ids, mask, logits = (np.concatenate([expected[f"{side}_{x}"] for side in SIDES]) for x in ("ids", "mask", "logits"))
    y = jit(model.apply)({"params": params}, ids, mask)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y[mask == 1], logits[mask == 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama_biases", "gemma3_text", "qwen3_moe"])
def test_fused_on_request(name):
    _, _, expected = checkpoint(name)
    model, params, _ = jpeft.hf.load(FIXTURES / name, fused=True)
    assert params["layers_0"]["attention"].keys() & {"qkv", "query", "key", "value"} == {"qkv"}
    ids, mask, logits = (expected[f"right_{x}"] for x in ("ids", "mask", "logits"))
    y = jit(model.apply)({"params": params}, ids, mask)
    np.testing.assert_allclose(y[mask == 1], logits[mask == 1], rtol=0, atol=1e-5)


@every
def test_gradients(name, tmp_path):
    model, params, expected = checkpoint(name)
    ids, mask = expected["right_ids"], expected["right_mask"]
    count = float(mask[:, 1:].sum())

    @jit
    @jax.value_and_grad
    def mean_loss(params):
        labels = jnp.where(mask == 1, ids, -100)
        return jnp.sum(model.apply({"params": params}, ids, mask, labels=labels)) / count

    shutil.copy(FIXTURES / name / "config.json", tmp_path)
    shutil.copy(FIXTURES / name / "gradients.safetensors", tmp_path / "model.safetensors")
    loss, gradients = mean_loss(params)
    np.testing.assert_allclose(loss, expected["loss"], rtol=0, atol=1e-5)
    theirs = jpeft.hf.load(tmp_path, scan=model.scan)[1]
    assert all(np.abs(leaf).max() > 1e-2 for leaf in jax.tree.leaves(theirs))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-4), gradients, theirs)


@every
def test_greedy_tokens(name):
    model, params, expected = checkpoint(name)

    @jit
    def generate(ids, mask, steps):
        """Greedy tokens (batch, steps), one at a time after the prompts."""
        batch, length = ids.shape
        rows, ends = jnp.arange(batch), jnp.max(jnp.where(mask == 1, jnp.arange(length)[None], 0), axis=1)
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        cache = model.init_cache(batch, length + len(steps))
        logits, cache = model.apply({"params": params}, ids, mask, positions, cache=cache)

        def step(state, _):
            token, position, cache = state
            y, cache = model.apply({"params": params}, token[:, None], None, position[:, None], cache=cache)
            return (jnp.argmax(y[:, 0], axis=-1), position + 1, cache), token

        first = jnp.argmax(logits[rows, ends], axis=-1), positions[rows, ends] + 1, cache
        return jax.lax.scan(step, first, steps)[1].T

    for side in SIDES:
        tokens = generate(expected[f"{side}_ids"], expected[f"{side}_mask"], np.zeros(64))
        np.testing.assert_array_equal(tokens, expected["tokens"])
