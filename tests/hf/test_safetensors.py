"""Files of tensors: every type is read, and what is damaged or hostile is refused, by the library or by us."""

import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jpeft.hf import _safetensors
from jpeft.hf._safetensors import checkpoint, tensors


TYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int8", "uint8", "bool")


def entry(dtype="F32", shape=(2,), at=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(at), **more}


def raw(path, header, data=b"", size=None):
    """A file with this header, an object or its text, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)
    return path


@pytest.mark.parametrize("name", TYPES)
def test_every_type_is_read_as_it_was_written(tmp_path, name):
    x = (np.arange(12).reshape(3, 4) % 2).astype(jnp.dtype(name))
    save_file({"a": x, "scalar": np.array(x[0, 1]), "empty": x[:0]}, tmp_path / "x.safetensors")
    found = tensors(tmp_path / "x.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in found.items()} == {
        "a": ((3, 4), x.dtype), "scalar": ((), x.dtype), "empty": ((0, 4), x.dtype),
    }  # fmt: skip
    for tensor, want in ((found["a"], x), (found["scalar"], x[0, 1])):
        got = tensor.read()
        assert got.dtype == x.dtype and got.tobytes() == want.tobytes()


@pytest.mark.parametrize("shape", [(40, 7), (3, 40, 7), (2, 3, 4, 5), (300,)])
def test_a_tensor_is_read_in_blocks_into_any_order(tmp_path, monkeypatch, shape):
    monkeypatch.setattr(_safetensors, "BLOCK", 64)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    save_file({"before": x[:1], "x": x}, tmp_path / "x.safetensors")
    into = np.zeros(shape[::-1], jnp.bfloat16)
    tensors(tmp_path / "x.safetensors")["x"].read_into(into.T)
    np.testing.assert_array_equal(into.T, x.astype(jnp.bfloat16))


TWICE = b'{"a":%s,"a":%s}' % (json.dumps(entry(at=(8, 16))).encode(), json.dumps(entry()).encode())
HOSTILE = {
    "header beyond the file": {"header": {"a": entry()}, "data": bytes(8), "size": 10**6},
    "header of 2^64 - 1 bytes": {"header": {"a": entry()}, "data": bytes(8), "size": 2**64 - 1},
    "no JSON": {"header": b"{"},
    "no object": {"header": b"[1]"},
    "no text": {"header": b'{"\xff":{}}'},
    "nested too deep": {"header": b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}"},
    "a tensor twice": {"header": TWICE, "data": bytes(8)},
    "a tensor twice, with its bytes": {"header": TWICE.replace(b"[8, 16]", b"[0, 8]"), "data": bytes(8)},
    "overlapping": {"header": {"a": entry(), "b": entry(at=(4, 12))}, "data": bytes(12)},
    "the same bytes": {"header": {"a": entry(), "b": entry()}, "data": bytes(8)},
    "beyond the end": {"header": {"a": entry(shape=(20,), at=(0, 80))}, "data": bytes(8)},
    "a hole": {"header": {"a": entry(), "b": entry(at=(16, 24))}, "data": bytes(24)},
    "more at the end": {"header": {"a": entry()}, "data": bytes(24)},
    "an unknown type": {"header": {"a": entry("F13")}, "data": bytes(8)},
    "a type that JAX has not": {"header": {"a": entry("F8_E8M0", at=(0, 2))}, "data": bytes(2)},
    "another size than the shape": {"header": {"a": entry(shape=(3,))}, "data": bytes(8)},
    "a negative size": {"header": {"a": entry(shape=(-2,))}, "data": bytes(8)},
    "a size that overflows": {"header": {"a": entry(shape=(2**62, 8), at=(0, 0))}},
    "offsets in reverse": {"header": {"a": entry(at=(8, 0))}, "data": bytes(8)},
    "metadata that is no text": {"header": {"__metadata__": {"format": 1}, "a": entry()}, "data": bytes(8)},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(tmp_path, name):
    path = raw(tmp_path / "model.safetensors", **HOSTILE[name])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        tensors(path)


def test_a_file_that_is_no_file_of_tensors(tmp_path):
    for content in (b"", b"\x80\x04", b"PK\x03\x04" + bytes(100)):
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="damaged, or no safetensors file"):
            tensors(tmp_path / "x.safetensors")


def test_a_file_that_becomes_shorter(tmp_path):
    save_file({"a": np.ones((40, 40), np.float32)}, tmp_path / "x.safetensors")
    found = tensors(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="ends within a"):
        found["a"].read()


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, 10**4), byte=st.integers(0, 255))
def test_one_wrong_byte_is_refused_or_reads_no_other_bytes(tmp_path_factory, at, byte):
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    arrays = {"a": np.arange(6, dtype=np.float32), "b": np.arange(4, dtype=np.float16).reshape(2, 2)}
    save_file(arrays, path, metadata={"format": "pt"})
    content = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    content[at % end] = byte
    path.write_bytes(content)
    try:
        found = tensors(path)
    except ValueError:
        return
    own = content[end:]
    assert sum(len(t.read().tobytes()) for t in found.values()) == len(own)
    assert sorted(own[t.offset - end :][: t.nbytes] for t in found.values()) == sorted(
        t.read().tobytes() for t in found.values()
    )


@pytest.fixture
def sharded(tmp_path):
    """Writes a directory of two files, with an index that is changed as told."""

    def sharded(change=lambda places: places):
        save_file({"a": np.zeros(2, np.float32)}, tmp_path / "model-1.safetensors")
        save_file({"b": np.ones(2, np.float32)}, tmp_path / "model-2.safetensors")
        places = change({"a": "model-1.safetensors", "b": "model-2.safetensors"})
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        return tmp_path

    return sharded


def test_an_index_of_several_files(sharded):
    found = checkpoint(sharded())
    assert {name: tensor.read().tolist() for name, tensor in found.items()} == {"a": [0, 0], "b": [1, 1]}


@pytest.mark.parametrize("name", ["../model-1.safetensors", "/etc/passwd", "sub/model-1.safetensors"])
def test_an_index_that_leaves_the_directory(sharded, name):
    directory = sharded(lambda places: places | {"a": name})
    with pytest.raises(ValueError, match="not in this directory itself"):
        checkpoint(directory)


@pytest.mark.parametrize("places", [None, [], {"a": 1}])
def test_an_index_without_a_map(sharded, places):
    with pytest.raises(ValueError, match="no weight_map"):
        checkpoint(sharded(lambda _: places))


def test_an_index_and_its_files_must_agree(sharded):
    with pytest.raises(ValueError) as error:
        checkpoint(sharded(lambda places: {"a": places["b"], "c": places["a"]}))
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "a is not in model-2.safetensors",
        "c is not in model-1.safetensors",
        "a is in model-1.safetensors, unmentioned",
        "b is in model-2.safetensors, unmentioned",
    ]


def test_an_index_that_names_no_file(sharded):
    with pytest.raises(FileNotFoundError, match=r"lacks files that its index names: model-3\.safetensors"):
        checkpoint(sharded(lambda places: places | {"a": "model-3.safetensors"}))


def test_an_index_with_a_name_twice(sharded):
    directory = sharded()
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x", "a": "y"}}')
    with pytest.raises(ValueError, match=r"\['a'\] are there twice"):
        checkpoint(directory)


def test_links_stay_in_the_directory(sharded, tmp_path_factory):
    directory, elsewhere = sharded(), tmp_path_factory.mktemp("elsewhere")
    file = directory / "model-1.safetensors"
    file.rename(directory / "real.safetensors")
    file.symlink_to("real.safetensors")
    assert checkpoint(directory).keys() == {"a", "b"}
    (directory / "real.safetensors").rename(elsewhere / "real.safetensors")
    file.unlink()
    file.symlink_to(elsewhere / "real.safetensors")
    with pytest.raises(ValueError, match="a link out of its directory"):
        checkpoint(directory)


def test_the_hubs_cache_is_one_of_links(tmp_path):
    blobs, snapshot = tmp_path / "models--owner--name/blobs", tmp_path / "models--owner--name/snapshots/0a1b"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file({"a": np.zeros(2, np.float32)}, blobs / "c0ffee")
    (snapshot / "model.safetensors").symlink_to("../../blobs/c0ffee")
    assert checkpoint(snapshot)["a"].read().tolist() == [0, 0]


def test_pickles_are_never_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin, .* pickles, .*save_pretrained"):
        checkpoint(tmp_path)
