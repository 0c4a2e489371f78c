"""Adapters of mlx-lm: `y = x W + scale (x A) B`, with A (in, rank) and B (rank, out)."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import jpeft
from jpeft import hf


def write(directory, tensors, kind="lora", **given):
    config = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": {"rank": 2, "dropout": 0.0, **given}}
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapters.safetensors")
    return directory


def normal(*shapes):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


QUERY = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(("given", "scale"), [({"scale": 3.0}, 3.0), ({}, 20.0)])
def test_lora(given, scale, bases, tmp_path):
    model, params = bases["llama"]
    a, b = normal((16, 2), (2, 16))
    tuned = hf.load_adapter(write(tmp_path, {f"{QUERY}.lora_a": a, f"{QUERY}.lora_b": b}, **given), params, model=model)
    found = jpeft.merge(tuned)["layers_0"]["attention"]["query"]["kernel"]
    base = params["layers_0"]["attention"]["query"]["kernel"]
    np.testing.assert_allclose(found, base + scale * (a @ b), rtol=1e-5, atol=1e-5)


def test_dora(bases, tmp_path):
    model, params = bases["llama"]
    a, b, m = normal((16, 2), (2, 16), (16,))
    tensors = {f"{QUERY}.lora_a": a, f"{QUERY}.lora_b": b, f"{QUERY}.m": m}
    tuned = hf.load_adapter(write(tmp_path, tensors, "dora", scale=3.0), params, model=model)
    v = np.asarray(params["layers_0"]["attention"]["query"]["kernel"]) + 3 * (a @ b)
    found = jpeft.merge(tuned)["layers_0"]["attention"]["query"]["kernel"]
    np.testing.assert_allclose(found, m * v / np.linalg.norm(v, axis=0), rtol=1e-5, atol=1e-5)


def test_experts(bases, tmp_path):
    """Three-dimensional: A (experts, rank, in) and B (experts, out, rank)."""
    model, params = bases["mixtral"]
    at = "model.layers.1.block_sparse_moe.switch_mlp"
    a, b = normal((3, 2, 16), (3, 24, 2))
    tensors = {f"{at}.up_proj.lora_a": a, f"{at}.up_proj.lora_b": b}
    tuned = hf.load_adapter(write(tmp_path, tensors, scale=3.0), params, model=model)
    found = jpeft.merge(tuned)["layers_1"]["moe"]["experts"]["gate_up"]
    base = params["layers_1"]["moe"]["experts"]["gate_up"]
    np.testing.assert_array_equal(found[..., :24], base[..., :24])
    np.testing.assert_allclose(found[..., 24:], base[..., 24:] + 3 * np.swapaxes(b @ a, 1, 2), rtol=1e-5, atol=1e-5)


def test_all_parameters(bases, tmp_path):
    model, params = bases["llama"]
    (weight,) = normal((16, 16))
    tuned = hf.load_adapter(write(tmp_path, {f"{QUERY}.weight": weight}, "full"), params, model=model)
    node = tuned["layers_0"]["attention"]["query"]["kernel"]
    assert isinstance(node, jpeft.Free)
    np.testing.assert_array_equal(node.value(), weight.T)


def test_faults_are_all_told(bases, tmp_path):
    model, params = bases["llama"]
    a, b = normal((16, 2), (3, 16))
    tensors = {f"{QUERY}.lora_a": a, f"{QUERY}.lora_b": b, "model.nowhere.lora_a": a}
    with pytest.raises(ValueError) as error:
        hf.load_adapter(write(tmp_path, tensors), params, model=model)
    assert "unexpected: model.nowhere.lora_a" in str(error.value)
    assert f"shape: {QUERY}.lora_b is (3, 16), expected (2, 16)" in str(error.value)
    with pytest.raises(ValueError, match="scale and dropout must be numbers"):
        hf.load_adapter(write(tmp_path, tensors, scale="three"), params, model=model)
    with pytest.raises(ValueError, match="fine_tune_type = 'galore'"):
        hf.load_adapter(write(tmp_path, tensors, "galore"), params, model=model)
