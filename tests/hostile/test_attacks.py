"""Adapters made to do harm: each is refused by the documented error, or is none, in little time and memory."""

import json
import os
import pickle

import numpy as np
import pytest
import subjects
from safetensors.numpy import load_file, save_file
from watch import watching

from jpeft import hf


CASE = "llama-lora"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SECONDS, MEMORY = 2.0, 2**26  # of the processor, most of it on a large header; bytes beyond what the files take


@pytest.fixture
def attack(adapter, tmp_path):
    """What reading an adapter says that was changed so."""
    for seed in (CASE, f"{CASE}-patterns"):  # what is imported and compiled at first use
        adapter.write(seed, tmp_path / seed)
        adapter.read(seed, tmp_path / seed)

    def attack(change):
        directory = tmp_path / "case"
        adapter.write(CASE, directory)
        change(directory)
        size = sum(path.stat().st_blocks * 512 for path in directory.iterdir() if path.is_file())
        message = None
        with watching(directory) as watched:
            try:
                subjects.wait(adapter.read(CASE, directory))
            except hf.AdapterFormatError as error:
                message = str(error)
        assert watched.faults == []
        assert watched.seconds < SECONDS
        assert watched.peak < MEMORY + 4 * size
        return message

    return attack


def fields(**given):
    """Changes fields of the config."""

    def change(directory):
        path = directory / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | given))

    return change


def text(edit):
    """Changes the text of the config."""
    return lambda directory: (directory / CONFIG).write_bytes(edit((directory / CONFIG).read_text()))


def header(edit):
    """Changes the text of the header of tensors, and what is behind it."""

    def change(directory):
        path = directory / WEIGHTS
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        head, payload = edit(data[8:end], data[end:])
        path.write_bytes(len(head).to_bytes(8, "little") + head + payload)

    return change


def entry(name=b"a", shape=b"1", end=4):
    """A header of one tensor."""
    return b'{"%s":{"dtype":"F32","shape":[%s],"data_offsets":[0,%d]}}' % (name, shape, end)


def sparse(directory):
    """A file of 32 GiB that takes no room on the disk."""
    count = 2**33
    head = entry(shape=b"%d" % count, end=4 * count)
    (directory / WEIGHTS).write_bytes(len(head).to_bytes(8, "little") + head)
    os.truncate(directory / WEIGHTS, 8 + len(head) + 4 * count)


def arrays(edit):
    """Changes the tensors."""

    def change(directory):
        found = load_file(directory / WEIGHTS)
        save_file(edit(found), directory / WEIGHTS)

    return change


def elsewhere(name):
    """Puts a file out of the directory, and a link to it."""

    def change(directory):
        (directory / name).rename(directory.parent / name)
        (directory / name).symlink_to(directory.parent / name)

    return change


many = lambda count: [f"name{i}" for i in range(count)]
first = lambda old, new: header(lambda head, data: (head.replace(old, new, 1), data))

REFUSED = {
    "a name twice": (text(lambda t: t.replace("{", '{"r": 1, "r": 2, ', 1).encode()), "are there twice"),
    "a name twice in 60,000": (
        text(lambda t: b'{"a": 1, "a": 2, %s}' % b", ".join(b'"%d": 0' % i for i in range(60_000))), "are there twice",
    ),
    "NaN": (text(lambda t: t.replace('"r": 2', '"r": NaN').encode()), "no finite number"),
    "infinity": (text(lambda t: t.replace('"r": 2', '"r": -Infinity').encode()), "no finite number"),
    "a float beyond all": (text(lambda t: t.replace('"r": 2', '"r": 1e999').encode()), "1e999 is no finite number"),
    "an integer beyond all": (text(lambda t: t.replace('"r": 2', '"r": ' + "9" * 400).encode()), "400 digits"),
    "half a character": (text(lambda t: t.replace('"r": 2', r'"r": "\uD800"').encode()), "surrogates not allowed"),
    "too deep": (text(lambda t: t.replace("{", '{"new": ' + "[" * 33 + "]" * 33 + ", ", 1).encode()), "32 levels"),
    "far too deep": (text(lambda t: b"[" * 100_000), "not JSON"),
    "a large config": (text(lambda t: t.encode() + b" " * 2**20), "larger than 1048576 bytes"),
    "another encoding": (text(lambda t: t.encode("utf-16")), "not JSON"),
    "no object": (text(lambda t: b"[]"), "not a JSON object"),
    "a type that is not known": (fields(peft_type="os.system"), "supported: ADALORA"),
    "a rank of none": (fields(r=0), "must be positive"),
    "a rank below none": (fields(r=-1), "must be positive"),
    "a rank in a float": (fields(r=2.0), "r = 2.0"),
    "a rank that is true": (fields(r=True), "r = True"),
    "a rank beyond memory": (fields(r=10**12), "expected (1000000000000, 16)"),
    "another rank than the tensors": (fields(r=3), "expected (3, 16)"),
    "an alpha beyond float32": (fields(lora_alpha=1e300), "lora_alpha = 1e+300"),
    "an alpha that is true": (fields(lora_alpha=True), "lora_alpha = True"),
    "code of a stranger": (fields(tokenizer_kwargs={"trust_remote_code": True}), "not understood"),
    "no pattern": (fields(alpha_pattern={"(": 1}), "no regular expression"),
    "a pattern beyond all": (fields(alpha_pattern={"(" + "a|" * 400 + "b){1000}": 1}), "no regular expression"),
    "too many patterns": (fields(rank_pattern=dict.fromkeys(many(5000), 2)), "more than 4096"),
    "too many names": (fields(layers_pattern=many(80_000), layers_to_transform=[0]), "4096 names at most"),
    "a text for names": (fields(modules_to_save="x" * 900_000), "4096 names at most"),
    "targets that take for ever": (fields(target_modules="((a+))+$"), "target_modules does not name"),
    "40,000 fields": (fields(**dict.fromkeys(many(40_000), 1)), "not understood\n... and 39001 more"),
    "a field's name that writes on the terminal": (fields(**{"\x1b[2J": 1}), r"\x1b[2J = 1"),
    "a long header": (header(lambda head, data: (head + b" " * 2**24, data)), "its header has"),
    "a header beyond the file": (lambda d: (d / WEIGHTS).write_bytes(b"\xff" * 8 + b"{}"), "its header has"),
    "a tensor twice": (
        header(lambda head, data: (head.replace(b"k_proj", b"q_proj").replace(b"v_proj", b"q_proj"), data)), "damaged"
    ),
    "a name that leaves": (first(b"base_model", b"../../etc"), "letters, digits and _.-"),
    "a name with a zero": (first(b"lora_A", rb"lora\u0000A"), "letters, digits and _.-"),
    "a long name": (first(b"lora_A", b"lora_A" * 20_000), "letters, digits and _.-"),
    "a field of a tensor that is not known": (first(b'"dtype"', b'"new":1,"dtype"'), "fields beyond"),
    "a type of tensors that is none": (first(b'"F32"', b'"F31"'), "damaged"),
    "65 axes": (header(lambda head, data: (entry(shape=b",".join([b"1"] * 65)), b"0000")), "its shape is"),
    "an empty tensor of 2^62 columns": (header(lambda head, data: (entry(shape=b"0,%d" % 2**62, end=0), b"")), "shape"),
    "a file beyond memory": (sparse, "Pass `max_bytes=`"),
    "NaN in a tensor": (arrays(lambda x: {n: a * np.float32(np.nan) for n, a in x.items()}), "not finite"),
    "float64": (arrays(lambda x: {n: a.astype(np.float64) for n, a in x.items()}), "is float64"),
    "transposed": (arrays(lambda x: {n: np.ascontiguousarray(a.T) for n, a in x.items()}), "shape:"),
    "a tensor less": (arrays(lambda x: dict([*x.items()][1:])), "missing:"),
    "a tensor more": (arrays(lambda x: x | {"model.other.lora_A.weight": np.ones(3, np.float32)}), "unexpected:"),
    "a config elsewhere": (elsewhere(CONFIG), "link out of its directory"),
    "tensors elsewhere": (elsewhere(WEIGHTS), "link out of its directory"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_harm_is_refused(name, attack):
    change, words = REFUSED[name]
    message = attack(change)
    assert message is not None and words in message
    assert message.isascii() and "\x1b" not in message and len(message) < 600_000


HARMLESS = {
    "a module to import": fields(auto_mapping={"parent_library": "antigravity", "base_model_class": "this"}),
    "another module to import": fields(megatron_core="antigravity"),
    "a path to a base": fields(base_model_name_or_path="/etc/passwd", revision="../.."),
    "a pattern that takes for ever": fields(alpha_pattern={"(.|.)*b": 3}),
    "a pattern of many states": fields(alpha_pattern={"(.{1,30}){1,30}x": 3}),
    "4096 patterns": fields(alpha_pattern=dict.fromkeys((f".*{i}.*x" for i in range(4096)), 3)),
    "many layers": fields(layers_to_transform=[*range(100_000)]),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_only_looks_harmful_loads(name, attack):
    assert attack(HARMLESS[name]) is None


@pytest.mark.parametrize("bad", [[1], "1", True, 1.0, None, -1, 2**31, 10**99], ids=repr)
@pytest.mark.parametrize("field", ["cpt_token_ids", "cpt_tokens_type_mask"])
def test_lists_hold_numbers_alone(field, bad, adapter, tmp_path):
    adapter.write("llama-cpt", tmp_path / "case")
    numbers = json.loads((tmp_path / "case" / CONFIG).read_text())[field]
    fields(**{field: [bad, *numbers[1:]]})(tmp_path / "case")
    with pytest.raises(hf.AdapterFormatError, match=field):
        adapter.read("llama-cpt", tmp_path / "case")


def test_a_callers_limit(adapter, tmp_path):
    _, params = subjects.base("llama", tmp_path)
    adapter.write(CASE, tmp_path / "case")
    size = (tmp_path / "case" / WEIGHTS).stat().st_size
    hf.load_adapter(tmp_path / "case", params, max_bytes=size)
    with pytest.raises(hf.AdapterFormatError, match=f"{size} bytes: {size - 1} at most are read"):
        hf.load_adapter(tmp_path / "case", params, max_bytes=size - 1)


FOREIGN = ("adapter_model.bin", "adapter.pt", "adapter.pth", "adapter.npz", "adapter.msgpack", "adapter.yaml")


@pytest.mark.parametrize("name", FOREIGN)
def test_other_formats_are_refused_by_name(name, adapter, tmp_path):
    adapter.write(CASE, tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / name).write_bytes(pickle.dumps({}))
    with watching(tmp_path) as watched, pytest.raises(FileNotFoundError, match=f"It has {name}, .* never read"):
        adapter.read(CASE, tmp_path)
    assert watched.faults == []


def test_what_is_no_file_is_not_opened(adapter, tmp_path):
    adapter.write(CASE, tmp_path)
    (tmp_path / WEIGHTS).unlink()
    os.mkfifo(tmp_path / WEIGHTS)  # who opens it waits for ever
    with pytest.raises(FileNotFoundError, match="has no adapter_model"):
        adapter.read(CASE, tmp_path)
