"""Checkpoints out: what was loaded comes back to the bit, nodes are merged, and nothing is left half written."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file
from test_load import AXES, same
from tiny import Config, Tiny, random_params, random_tensors

import jpeft
from jpeft.hf import _save, load, save


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_that_goes_in_and_out_is_the_same_to_the_byte(directory, tmp_path, dtype):
    arrays = random_tensors(dtype=jnp.dtype(dtype))
    path = directory(arrays)
    for scan in (False, True):
        model, params, _ = load(path, scan=scan)
        save(tmp_path / "out", model, params, overwrite=True)
        same(load_file(tmp_path / "out/model.safetensors"), arrays)
        assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == dtype
        with safe_open(tmp_path / "out/model.safetensors", "numpy") as file:
            assert file.metadata() == {"format": "pt"}


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    layers=st.integers(1, 3),
    experts=st.integers(1, 3),
    width=st.sampled_from([2, 6]),
    tied=st.booleans(),
    scan=st.booleans(),
    labels=st.sampled_from([0, 0, 3]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    shard_size=st.sampled_from([1, 200, 10**9]),
    seed=st.integers(0, 9),
)
def test_what_is_saved_is_loaded(tmp_path_factory, layers, experts, width, tied, scan, labels, dtype, shard_size, seed):
    config = Config(5, width, layers, experts, tied)
    model = Tiny(config, scan, labels, dtype, dtype)
    params = random_params(model, seed, dtype)
    path = tmp_path_factory.mktemp("saved") / "model"
    save(path, model, params, shard_size=shard_size)
    task = {"task": "classification", "num_labels": labels} if labels else {}
    loaded, again, _ = load(path, scan=scan, **task)
    same(again, params)
    assert loaded.config == config and loaded.apply({"params": again}, jnp.zeros((1, 2), jnp.int32)).dtype == dtype


def test_files_are_filled_to_the_limit(tmp_path):
    model = Tiny(Config())
    params = random_params(model)
    save(tmp_path / "model", model, params, shard_size=2000)
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{n + 1:05}-of-{len(files):05}.safetensors" for n in range(len(files))] and len(files) > 2
    found = {name: x for file in files for name, x in load_file(tmp_path / "model" / file).items()}
    assert {name: file for file in files for name in load_file(tmp_path / "model" / file)} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in found.values()) == 4 * sum(
        x.size for x in jax.tree.leaves(params)
    )
    for file in files:
        assert sum(x.nbytes for x in load_file(tmp_path / "model" / file).values()) <= 2000
    same(load(tmp_path / "model")[1], params)


def test_nodes_are_merged_and_quantized_kernels_written_as_numbers(tmp_path):
    model = Tiny(Config(), scan=True, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    params = jpeft.nf4(random_params(model, dtype=jnp.bfloat16), targets=AXES)
    params = jpeft.lora(params, rank=2, targets=AXES | {"lm_head/kernel": "io"})
    params = jax.tree.map(lambda x: x + jnp.ones_like(x) if x.dtype == jnp.float32 else x, params)
    with pytest.warns(UserWarning, match=r"2 kernels are quantized; the numbers .* layers/qkv/kernel in bfloat16"):
        save(tmp_path / "model", model, params)
    same(load(tmp_path / "model", scan=True)[1], jpeft.merge(params))


def test_nodes_that_cannot_be_merged_are_refused(tmp_path):
    model = Tiny(Config())
    params = jpeft.bottleneck(random_params(model), targets=r"layers_0/out", width=2)
    with pytest.raises(ValueError, match=r"cannot be merged[\s\S]*layers_0/out"):
        save(tmp_path / "model", model, params)
    assert not any(tmp_path.iterdir())


def test_all_faults_are_said_at_once(tmp_path):
    model = Tiny(Config())
    params = random_params(model)
    del params["lm_head"], params["layers_1"]["out"]["bias"]
    params |= {"other": jnp.ones(2), "embed": {"embedding": jnp.ones((12, 9))}}
    with pytest.raises(ValueError) as error:
        save(tmp_path / "model", model, params)
    assert str(error.value).splitlines() == [
        "These are not the parameters of this model:",
        "  missing: layers_1/out/bias",
        "  missing: lm_head/kernel",
        "  shape: embed/embedding is (12, 9), expected (12, 8)",
        "  unexpected: other",
    ]


def test_a_model_of_another_kind_is_refused(tmp_path):
    model = Tiny(Config(model_type="other"))
    with pytest.raises(ValueError, match=r"A Tiny of model_type 'other' cannot be written; known: .*tiny"):
        save(tmp_path / "model", model, random_params(model))


def test_nothing_is_overwritten_unasked(tmp_path):
    model = Tiny(Config())
    params, path = random_params(model), tmp_path / "model"
    path.mkdir()
    save(path, model, params)  # an empty directory is no more than a name
    (path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save(path, model, params)
    assert (path / "notes.txt").exists()
    changed = jax.tree.map(lambda x: x + 1, params)
    save(path, model, changed, overwrite=True)
    assert not (path / "notes.txt").exists()
    same(load(path)[1], changed)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"has no config\.json"):
        save(other, model, params, overwrite=True)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["model", "other"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_save_leaves_what_was_there(tmp_path, monkeypatch, overwrite):
    model = Tiny(Config())
    params, path = random_params(model), tmp_path / "model"
    if overwrite:
        save(path, model, params)
    write, count = _save.write, iter(range(9))

    def failing(*args):
        if next(count) == 1:
            raise OSError("disk full")
        write(*args)

    monkeypatch.setattr(_save, "write", failing)
    with pytest.raises(OSError, match="disk full"):
        save(path, model, jax.tree.map(lambda x: x + 1, params), shard_size=2000, overwrite=overwrite)
    assert [x.name for x in tmp_path.iterdir()] == (["model"] if overwrite else [])
    if overwrite:
        same(load(path)[1], params)


def test_what_a_killed_save_has_left_is_in_no_way(tmp_path):
    model = Tiny(Config())
    for end in ("new", "old"):
        (tmp_path / f".model.{end}").mkdir()
        (tmp_path / f".model.{end}/config.json").write_text("{}")
    for _ in range(2):
        save(tmp_path / "model", model, random_params(model), overwrite=True)


def test_a_tokenizer_that_is_not_there(tmp_path):
    model, source = Tiny(Config()), tmp_path / "source"
    with pytest.raises(FileNotFoundError, match="source is no directory"):
        save(tmp_path / "model", model, random_params(model), tokenizer=source)
    source.mkdir()
    (tmp_path / "secret").write_text("mine")
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="link out of its directory"):
        save(tmp_path / "model", model, random_params(model), tokenizer=source)
    assert not (tmp_path / "model").exists()


def test_the_tokenizer_goes_along(tmp_path):
    from tokenizers import Tokenizer, models

    model = Tiny(Config())
    params = random_params(model)
    save(tmp_path / "a", model, params, tokenizer=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    (tmp_path / "a/chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "a/optimizer.pt").write_text("not this")
    save(tmp_path / "b", model, params, tokenizer=tmp_path / "a")
    names = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert {x.name for x in (tmp_path / "b").iterdir()} == names
    assert load(tmp_path / "b")[2].encode("b").ids == [1]


FIXTURES = sorted(path.parent for path in (Path(__file__).parents[1] / "fixtures").glob("*/*/config.json"))


@pytest.mark.parity
@pytest.mark.parametrize("source", FIXTURES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_transformers_loads_what_is_saved(tmp_path, source):
    """Transformers' own model, before and after a way through ours, scanned and in several files."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model, params, _ = load(source, scan=True)
    save(tmp_path / "model", model, params, shard_size=10**4)

    (name,) = json.loads((tmp_path / "model/config.json").read_text())["architectures"]

    def outputs(path):
        theirs, said = getattr(transformers, name).from_pretrained(path, output_loading_info=True)
        assert not {x for x in said["missing_keys"] if "pooler" not in x} and not said["mismatched_keys"]
        assert path == source or not said["unexpected_keys"]  # the source may have a head that ours does without
        names = ["input_ids", "decoder_input_ids"][: 1 + theirs.config.is_encoder_decoder]
        inputs = {name: torch.tensor([[5, 3, 4, 1]]) for name in names}
        if theirs.main_input_name == "pixel_values":
            shape = (1, theirs.config.num_channels, *theirs.config.image_size)
            inputs = {"pixel_values": torch.arange(np.prod(shape)).reshape(shape) / 100}
        with torch.no_grad():
            y = theirs.eval()(**inputs)[0].numpy()
        return y, {name: x for name, x in theirs.state_dict().items() if "pooler" not in name}

    (y, weights), (want, source_weights) = outputs(tmp_path / "model"), outputs(source)
    assert weights.keys() == source_weights.keys()
    assert all(torch.equal(x, source_weights[name]) for name, x in weights.items())
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)  # torch's own sums depend on where arrays lie
