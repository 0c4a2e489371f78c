"""Checkpoints in: every tensor in its place, in every form, and everything that does not fit said at once."""

import functools
import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file
from tiny import Config, Tiny, random_tensors

import jpeft
from jpeft import _lazy
from jpeft.hf import _extra, load
from jpeft.hf._match import Source


AXES = {r"layers/qkv/kernel": "sio", r"layers/up": "ssio"}
UNROLLED = {r"layers_\d/qkv/kernel": "io", r"layers_\d/up": "sio"}


def same(a, b):
    """Equal in structure, types and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def faults(directory, **options):
    with pytest.raises(ValueError) as error:
        load(directory, **options)
    first, *rest = str(error.value).splitlines()
    assert str(directory) in first
    return [line.strip() for line in rest]


def test_every_tensor_lands_in_its_place(directory):
    arrays = random_tensors()
    model, params, tokenizer = load(directory(arrays))
    assert model == Tiny(Config(), dtype=np.dtype("float32"), param_dtype=np.dtype("float32")) and tokenizer is None
    h = "model.h.1."
    q, k, v = (arrays[f"{h}{name}.weight"].T for name in ("q_proj", "k_proj", "v_proj"))
    w1, w3 = (np.stack([arrays[f"{h}experts.{e}.{name}.weight"].T for e in (0, 1)]) for name in ("w1", "w3"))
    want = {
        "qkv/kernel": np.concatenate([q, k, v], axis=1),
        "qkv/bias": np.concatenate([arrays[f"{h}{name}.bias"] for name in ("q_proj", "k_proj", "v_proj")]),
        "out/kernel": arrays[f"{h}o_proj.weight"],
        "out/bias": arrays[f"{h}o_proj.bias"],
        "norm/scale": arrays[f"{h}ln.weight"],
        "norm/bias": arrays[f"{h}ln.bias"],
        "up": np.concatenate([w1, w3], axis=2),
    }
    same(flatten_dict(params["layers_1"], sep="/"), want)
    same(params["embed"]["embedding"], arrays["model.wte.weight"])
    same(params["lm_head"]["kernel"], arrays["lm_head.weight"].T)
    assert sum(x.size for x in jax.tree.leaves(params)) == sum(x.size for x in arrays.values())


def test_scanned_layers_are_the_stacked_ones(directory):
    path = directory(random_tensors())
    plain, scanned = load(path)[1], load(path, scan=True)[1]
    layers = [plain.pop(f"layers_{i}") for i in range(3)]
    same(scanned, plain | {"layers": jax.tree.map(lambda *xs: jnp.stack(xs), *layers)})


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16", "float8_e4m3fn", "float64"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scan", [False, True])
def test_types(directory, stored, dtype, scan):
    arrays = random_tensors(dtype=jnp.dtype(stored))
    model, params, _ = load(directory(arrays), dtype=dtype, scan=scan)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    assert jnp.dtype(model.dtype) == jnp.dtype(model.param_dtype) == jnp.dtype(dtype)
    np.testing.assert_array_equal(params["embed"]["embedding"], arrays["model.wte.weight"].astype(jnp.dtype(dtype)))


def test_types_are_those_of_the_file_if_none_is_given(directory):
    arrays = random_tensors(dtype=jnp.bfloat16)
    arrays |= {name: x.astype(np.float32) for name, x in arrays.items() if ".ln." in name}
    model, params, _ = load(directory(arrays))
    assert model.dtype == jnp.bfloat16
    layer = params["layers_0"]
    assert layer["norm"]["scale"].dtype == jnp.float32 and layer["out"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize("axes", [UNROLLED, AXES], ids=["unrolled", "scanned"])
def test_quantized_while_it_is_read_or_after(directory, axes):
    path, options = directory(random_tensors()), {"scan": axes is AXES, "dtype": "bfloat16"}
    plain = load(path, **options)[1]
    lora = jpeft.lora(rank=2, targets=axes)
    for transform in (lora, jpeft.chain(jpeft.nf4(targets=axes), jpeft.unfreeze(targets=".*bias"), lora)):
        same(load(path, quantize=transform, **options)[1], transform(plain))
        key = jax.random.key(3)
        same(load(path, quantize=transform, key=key, **options)[1], transform(plain, key=key))


def noise(key, w):
    return jpeft.Int8(codes=w.astype(jnp.int8), scale=jax.random.normal(key, (1, w.shape[1])))


def test_every_part_has_the_key_that_it_has_in_the_whole(directory):
    path = directory(random_tensors())
    transform = functools.partial(jpeft.wrap, new=noise, targets=AXES)
    same(load(path, scan=True, quantize=transform)[1], transform(load(path, scan=True)[1]))


@pytest.mark.slow
def test_parts_are_read_one_at_a_time_and_let_go(directory, monkeypatch):
    path, alive = directory(random_tensors()), []
    read = Source.read

    def counted(self, index):
        gc.collect()
        assert sum(ref() is not None for ref in alive) <= 1  # the one that JAX took as it is
        x = read(self, index)
        alive.append(weakref.ref(x))
        return x

    monkeypatch.setattr(Source, "read", counted)
    load(path, scan=True, quantize=jpeft.int8(targets=AXES))
    assert len(alive) == 2 + 3 * (2 + 2 + 2 + 2)  # an embedding and a head; of a layer six arrays and two experts


def test_all_faults_are_said_at_once(directory):
    arrays = random_tensors()
    del arrays["model.h.0.o_proj.bias"], arrays["model.h.2.experts.1.w3.weight"]
    arrays["model.h.1.k_proj.weight"] = np.zeros((5, 8), np.float32)
    arrays["model.h.1.q_proj.bias"] = np.zeros(8, np.int32)
    arrays["model.h.0.v_proj.bias"] = np.zeros(4, np.float16)
    arrays["lm_head.weight"] = arrays["lm_head.weight"].astype(np.float64)
    arrays |= {"model.h.3.o_proj.bias": np.zeros(8, np.float32), "adapter": np.zeros(3, np.float32)}
    assert faults(directory(arrays)) == [
        "dtype: lm_head.weight is float64, which JAX has not enabled: pass `dtype=...`",
        "dtype: model.h.0.v_proj.bias is float16, model.h.0.q_proj.bias float32: pass `dtype=...`",
        "dtype: model.h.1.q_proj.bias is int32, expected floating-point numbers",
        "missing: model.h.0.o_proj.bias",
        "missing: model.h.2.experts.1.w3.weight",
        "shape: model.h.1.k_proj.weight is (5, 8), expected (4, 8)",
        "unexpected: adapter",
        "unexpected: model.h.3.o_proj.bias",
    ]


def test_names_of_old_files_and_of_bare_models(directory):
    arrays = random_tensors()
    want = load(directory(arrays))[1]
    old = {name.removeprefix("model.").replace("ln.weight", "ln.gamma"): x for name, x in arrays.items()}
    old |= {"h.0.bias_buffer": np.zeros(3, np.int64)}
    same(load(directory(old))[1], want)


def test_one_tensor_under_two_names_is_refused(directory):
    arrays = random_tensors()
    arrays["wte.weight"] = arrays["model.wte.weight"]
    assert len(faults(directory(arrays))) == 1


@pytest.mark.parametrize("held", [("model.wte.weight",), ("lm_head.weight",), ("model.wte.weight", "lm_head.weight")])
def test_a_tied_head_is_held_once_or_twice(directory, held):
    arrays = random_tensors(Config(tie_word_embeddings=True))
    table = arrays.pop("model.wte.weight")
    params = load(directory(arrays | dict.fromkeys(held, table), tie_word_embeddings=True))[1]
    assert "lm_head" not in params
    np.testing.assert_array_equal(params["embed"]["embedding"], table)


def test_a_tied_head_that_differs_is_refused(directory):
    arrays = random_tensors()
    (fault,) = faults(directory(arrays, tie_word_embeddings=True))
    assert fault.startswith("tied: lm_head.weight differs from model.wte.weight")


def test_numbers_that_are_not_finite_are_refused_if_asked(directory):
    arrays = random_tensors(dtype=jnp.bfloat16)
    arrays["model.h.1.o_proj.weight"][0, 0] = np.nan
    arrays["model.wte.weight"][3, 1] = np.inf
    path = directory(arrays)
    load(path)
    for scan, layers in ((False, "layers_1"), (True, "layers")):
        assert faults(path, check_finite=True, scan=scan) == ["embed/embedding", f"{layers}/out/kernel"]


def test_a_new_head_is_initialised_and_nothing_else(directory):
    arrays = random_tensors()
    del arrays["lm_head.weight"]
    path = directory(arrays)
    key = jax.random.key(1)
    model, params, _ = load(path, task="classification", num_labels=5, key=key)
    head = jax.jit(model.init)(key, jnp.zeros((1, 1), jnp.int32))["params"].pop("head")
    same(params.pop("head"), head)
    same(params, {k: x for k, x in load(directory(random_tensors()))[1].items() if k != "lm_head"})
    del arrays["model.wte.weight"]
    assert faults(directory(arrays), task="classification", num_labels=5) == ["missing: model.wte.weight"]


def test_a_head_that_the_file_has_is_read(directory):
    arrays = random_tensors()
    del arrays["lm_head.weight"]
    arrays |= {"score.weight": np.ones((5, 8), np.float32), "score.bias": np.arange(5, dtype=np.float32)}
    path = directory(arrays)
    assert load(path, task="classification", num_labels=5)[1]["head"]["bias"].tolist() == [0, 1, 2, 3, 4]
    assert faults(path, task="classification", num_labels=6) == [
        "shape: score.bias is (5,), expected (6,)", "shape: score.weight is (5, 8), expected (6, 8)",
    ]  # fmt: skip
    del arrays["score.bias"]
    assert faults(directory(arrays), task="classification", num_labels=5) == ["missing: score.bias"]


def test_several_files(directory):
    arrays = random_tensors()
    path = directory(arrays)
    want = load(path)[1]
    (path / "model.safetensors").unlink()
    names = sorted(arrays)
    places = {name: f"model-0000{1 + (n > 9)}-of-00002.safetensors" for n, name in enumerate(names)}
    for shard in set(places.values()):
        save_file({name: arrays[name] for name in names if places[name] == shard}, path / shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    same(load(path)[1], want)


@pytest.mark.slow
def test_a_mesh_of_eight_devices():
    tests = Path(__file__).with_name("sharded_load.py")
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", str(tests)]
    done = subprocess.run(command, env=os.environ | devices, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


CONFIGS = {
    "no object": (b"[1]", "not a JSON object"),
    "no JSON": (b"{", "is not JSON"),
    "no text": (b"\x93\x00", "is not JSON"),
    "nested too deep": (b"[" * 10**5, "is not JSON"),
    "a field twice": (b'{"model_type": "tiny", "model_type": "bert"}', r"\['model_type'\] are there twice"),
    "no type": (b"{}", "has model_type None; supported: .*tiny"),
    "a type that is no text": (b'{"model_type": ["tiny"]}', "has model_type"),
    "an unknown type": (b'{"model_type": "mamba"}', "has model_type 'mamba'"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_is_no_good(directory, name):
    path = directory(random_tensors())
    text, message = CONFIGS[name]
    (path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        load(path)


def test_a_config_that_is_too_large(directory, monkeypatch):
    monkeypatch.setattr("jpeft.hf._repository.LARGEST", 10)
    with pytest.raises(ValueError, match=r"config\.json is larger than 10 bytes"):
        load(directory(random_tensors()))


def test_a_directory_without_a_model(directory, tmp_path):
    path = directory(random_tensors())
    (path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load(path)
    for name in ("./nowhere", "/nowhere", "a/b/c", tmp_path / "model.safetensors"):
        with pytest.raises(FileNotFoundError, match=r"is no directory\. Give one, or the name of a repository"):
            load(name)


def test_the_tokenizer_is_that_of_the_directory(directory):
    from tokenizers import Tokenizer, models

    path = directory(random_tensors())
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(path / "tokenizer.json"))
    assert load(path)[2].encode("b").ids == [1]
    (path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json describes no tokenizer"):
        load(path)


def test_a_repository_is_downloaded_without_pickles(directory, monkeypatch):
    import huggingface_hub

    path, asked = directory(random_tensors()), {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert load("owner/name", revision="main")[0].config == Config()
    assert (asked["name"], asked["revision"]) == ("owner/name", "main")
    files = [
        "config.json", "model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.json",
        "adapter_model.safetensors", "adapters.safetensors", "pytorch_model.bin",
        "model.pt", "onnx/model.safetensors", "consolidated.safetensors", "modeling.py",
    ]  # fmt: skip
    wanted = {"allow_patterns": asked["allow_patterns"], "ignore_patterns": asked["ignore_patterns"]}
    assert list(huggingface_hub.utils.filter_repo_objects(files, **wanted)) == files[:6]


def test_a_repository_that_cannot_be_reached(monkeypatch):
    import huggingface_hub

    def unreachable(name, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(FileNotFoundError, match=r"owner/name is no directory, and no repository.*no network"):
        load("owner/name")


def test_a_missing_library_says_how_to_install_it(directory, monkeypatch):
    path = directory(random_tensors())
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "jpeft\[hf\]"'):
        load(path)
    assert _extra.extra("json") is json


def test_the_room_of_a_stack_is_that_of_its_parts():
    made = []

    def part(index):
        made.append(index)
        return {"a": jnp.full((2, 3), 10 * index[0] + index[1]), "b": jnp.int8(index[1])}

    found = _lazy.stack(part, (3, 2))
    assert made == [(i, j) for i in range(3) for j in range(2)]
    assert found["a"].shape == (3, 2, 2, 3) and found["a"][2, 1].tolist() == [[21] * 3] * 2
    assert found["b"].tolist() == [[0, 1]] * 3 and found["b"].dtype == jnp.int8
