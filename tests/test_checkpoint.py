"""Checkpoints: exact, complete, never wrong unnoticed, never half written."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jpeft
from jpeft import _storage
from jpeft._checkpoint import BaseMismatchError, restore, save
from jpeft._checksum import checksum
from jpeft._shared import SHARED, Ref
from jpeft._storage import CheckpointError


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = nn.tanh(nn.Dense(64, name=f"layers_{i}")(x))
        return nn.Dense(2, name="head")(x)


def base(dtype=jnp.float32, seed=0):
    shapes = jax.eval_shape(Net().init, jax.random.key(0), jax.ShapeDtypeStruct((1, 64), jnp.float32))["params"]
    return noise(jax.tree.map(lambda x: np.empty(x.shape, dtype), shapes), seed)


def noise(tree, seed=1):
    """Random numbers in the shapes and dtypes of the tree."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape).astype(x.dtype)), tree)


@functools.cache
def adapted(rank=2):
    """The base under a trained LoRA."""
    return trained(base(), jpeft.lora(rank=rank))


def trained(params, *methods):
    """The tree with the methods applied, and with random numbers in all that trains."""
    trainable, frozen = jpeft.partition(jpeft.chain(*methods)(params))
    return jpeft.combine(noise(trainable), frozen)


def assert_same(found, expected):
    """Equal structure, static fields included, dtypes and bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def size(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def reseal(directory, edit):
    """Edit the manifest as someone would who knows of its digest."""
    file = directory / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest = json.loads(edit(json.dumps({k: v for k, v in manifest.items() if k != "digest"})))
    file.write_text(json.dumps(manifest | {"digest": _storage._digest(manifest)}))


class Projected(jpeft.Branch):
    """A third party's: frozen random arrays, one of its own and one shared, and constants of every kind."""

    d: jpeft.Trainable[jax.Array]
    left: jpeft.Frozen[jax.Array]
    right: jpeft.Frozen[jax.Array | Ref]
    steps: jpeft.Frozen[dict]
    how: jpeft.Static[tuple] = ("fast", None, True, 0.1)
    dtype: jpeft.Static[object] = jnp.bfloat16

    def weight(self, w):
        return w + self.branch(jnp.eye(len(w)), None)

    def branch(self, x, key):
        return (x @ self.left * self.d[None]) @ self.right


def projected(params, *, key=None):
    def new(key, w):
        steps = {"0.1/a": jnp.arange(3), "0": {"1/a": jnp.float16([1])}, "none": jnp.zeros((0, 2))}
        return Projected(d=jnp.ones(2), left=jax.random.normal(key, (64, 2)), right=Ref("right"), steps=steps)

    return jpeft.wrap(params, new, targets="layers_.*/kernel") | {SHARED: {"right": jnp.ones((2, 64))}}


METHODS = {
    "lora": [jpeft.lora(rank=2, alpha=0.1, dropout=0.1)],
    "nested": [jpeft.lora(rank=2), jpeft.lora(rank=3)],
    "bitfit": [jpeft.bitfit()],
    "bottleneck": [jpeft.bottleneck(width=2, targets="layers_.*")],
    "layers": [jpeft.last_layers(k=1)],
    "many": [jpeft.lora(rank=2), jpeft.bottleneck(width=2, targets="layers_.*"), jpeft.bitfit(targets="head/bias")],
    "third party": [projected],
}


@pytest.mark.parametrize("quantize", [None, jpeft.nf4(), jpeft.int8(group=32)], ids=["float", "nf4", "int8"])
@pytest.mark.parametrize("method", METHODS)
def test_exact(tmp_path, method, quantize):
    ground = quantize(base()) if quantize else base()
    if quantize and method == "layers":
        ground = jpeft.int8(base(), targets="layers_0/kernel")  # what trains is not quantized
    params = trained(ground, *METHODS[method])
    save(tmp_path, params)
    assert_same(restore(tmp_path, ground), params)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes(tmp_path, dtype):
    params = trained(base(dtype), jpeft.lora(rank=2), jpeft.bitfit())
    params["layers_0"]["bias"] = jpeft.Free(array=jnp.asarray([-0.0, jnp.nan, jnp.inf] + [1e-7] * 61, dtype))
    params["layers_1"]["kernel"] = params["layers_1"]["kernel"].replace(a=jnp.arange(64, dtype=jnp.int4))
    save(tmp_path, params)
    assert_same(restore(tmp_path, base(dtype)), params)


def test_restored_runs_alike(tmp_path):
    x = jax.random.normal(jax.random.key(3), (2, 64))
    params = trained(base(), jpeft.nf4(), jpeft.lora(rank=2))
    save(tmp_path, params)
    found = restore(tmp_path, jpeft.nf4(base()))
    np.testing.assert_array_equal(*(jpeft.apply(Net(), {"params": p}, x) for p in (params, found)))


def test_stacked_and_boxed(tmp_path):
    ground = {
        "layers": {
            "kernel": nn.Partitioned(jax.random.normal(jax.random.key(0), (4, 8, 8)), names=("layer", None, "model")),
            "bias": nn.Partitioned(jnp.ones((4, 8)), names=("layer", None)),
        }
    }
    last = trained(ground, jpeft.last_layers(k=1))
    assert type(last["layers"]["kernel"]) is jpeft.Rows
    save(tmp_path / "last", last)
    assert_same(restore(tmp_path / "last", ground), last)

    stacked = trained(ground, jpeft.lora(rank=2, targets={".*kernel": "sio"}))
    save(tmp_path / "lora", stacked)
    assert_same(restore(tmp_path / "lora", ground), stacked)

    other = jax.tree.map(lambda x: x.at[0].add(1), ground)
    with pytest.raises(BaseMismatchError, match="2 of 2"):
        restore(tmp_path / "last", other)
    top = jax.tree.map(lambda x: x.at[3].add(1), ground)  # what the trained rows take the place of
    assert_same(restore(tmp_path / "last", top), last)


def test_names_that_look_alike(tmp_path):
    names = ["a/b", "a.b", "a~b", "a~1b", "a'b", "['a']"]
    ground = {name: {"kernel": jnp.full((2, 2), n, float)} for n, name in enumerate(names)}
    ground["a"] = {"b": {"kernel": jnp.ones((2, 2))}}
    params = trained(ground, jpeft.lora(rank=1), jpeft.bottleneck(width=1, targets=r"a\.b"))
    save(tmp_path, params)
    assert_same(restore(tmp_path, ground), params)


def test_other_containers(tmp_path):
    ground = [{"kernel": jnp.ones((4, 4))}, ({"kernel": np.ones((4, 4), np.float32)}, jnp.arange(3), 2.0)]
    params = trained(ground, jpeft.lora(rank=1))
    save(tmp_path, params)
    assert_same(restore(tmp_path, ground)[0], params[0])


def test_size(tmp_path):
    params = trained(base(), jpeft.lora(rank=8))
    bytes_ = save(tmp_path, params)
    assert bytes_ == sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file())
    leaves = len(jax.tree.leaves(params))
    assert 0.9 * size(jpeft.partition(params)[0]) < bytes_ < size(jpeft.partition(params)[0]) + 1000 * leaves
    wide = jax.tree.map(lambda x: jnp.tile(x, (4,) * x.ndim), base())  # as much to train, on a base 16 times the size
    assert save(tmp_path, trained(wide, jpeft.lora(rank=2)), overwrite=True) < bytes_ + 1000


def test_nothing_trains(tmp_path):
    for params in (base(), jpeft.nf4(base()), {"w": jpeft.Free(array=jnp.zeros((0, 3)))}):
        with pytest.raises(ValueError, match="nothing in this tree but its base"):
            save(tmp_path / "new", params)
    assert not (tmp_path / "new").exists()


def test_static_function_is_refused(tmp_path):
    class Activated(jpeft.Additive):
        w: jpeft.Trainable[jax.Array]
        activation: jpeft.Static[object] = None

    with pytest.raises(TypeError, match="layers_0/act: activation is <built-in function len>"):
        params = base()
        params["layers_0"]["act"] = Activated(w=jnp.ones(2), activation=len)
        save(tmp_path / "new", params)
    assert not (tmp_path / "new").exists()


def test_restore_over_a_tuned_tree(tmp_path):
    """Adapters in the base give way; the base that they stand on does not."""
    params = adapted()
    save(tmp_path, params)
    other = trained(base(), jpeft.lora(rank=5), jpeft.bottleneck(width=2, targets="layers_.*"))
    assert_same(restore(tmp_path, other), params)


# What the base must be.


def test_every_mismatch_at_once(tmp_path):
    save(tmp_path, trained(base(), jpeft.lora(rank=2), jpeft.bitfit()))
    other = base()
    del other["layers_0"]["kernel"]
    other["layers_9"] = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    other["layers_1"] = {"kernel": jnp.ones((32, 64)), "bias": jnp.ones(64, jnp.bfloat16)}
    with pytest.raises(CheckpointError) as error:
        restore(tmp_path, other, check_base=False)
    assert str(error.value).splitlines()[1:] == [
        "  missing: layers_0/kernel, float32 (64, 64)",
        "  unexpected: layers_9/bias, float32 (2,)",
        "  unexpected: layers_9/kernel, float32 (2, 2)",
        "  changed: layers_1/bias, float32 (64,) when saved, bfloat16 (64,) now",
        "  changed: layers_1/kernel, float32 (64, 64) when saved, float32 (32, 64) now",
    ]
    assert "5 parameters" in str(error.value)


def test_other_weights_are_refused(tmp_path):
    params = trained(base(), jpeft.lora(rank=2), jpeft.bitfit(targets="head/bias"))
    save(tmp_path, params)
    other = base()
    other["layers_0"]["bias"] = other["layers_0"]["bias"].at[3].add(1e-6)  # under no adapter
    other["layers_1"]["kernel"] = jnp.flip(other["layers_1"]["kernel"], 0)  # under one
    other["head"]["bias"] = other["head"]["bias"] + 1  # another has trained in its place
    with pytest.raises(BaseMismatchError, match=r"2 of 6 (.|\n)*layers_0/bias, array\n  layers_1/kernel, LoRA$"):
        restore(tmp_path, other)
    found = restore(tmp_path, other, check_base=False)
    assert_same(found["head"]["bias"], params["head"]["bias"])
    assert_same(found["layers_1"]["kernel"], params["layers_1"]["kernel"].replace(base=other["layers_1"]["kernel"]))


def test_base_in_another_form(tmp_path):
    plain, quantized = adapted(), trained(base(), jpeft.nf4(), jpeft.lora(rank=2))
    save(tmp_path / "plain", plain)
    save(tmp_path / "nf4", quantized)
    with pytest.raises(CheckpointError, match=r"2 kernels were quantized .*jpeft.nf4(.|\n)*_1/kernel, LoRA\(NF4\)"):
        restore(tmp_path / "nf4", base())
    with pytest.raises(BaseMismatchError, match=r"2 of 6 (.|\n)*layers_1/kernel, LoRA when saved, LoRA\(NF4\) now"):
        restore(tmp_path / "plain", jpeft.nf4(base()))
    with pytest.raises(BaseMismatchError, match=r"LoRA\(NF4\) when saved, LoRA\(Int8\) now"):
        restore(tmp_path / "nf4", jpeft.int8(base()))
    with pytest.raises(BaseMismatchError, match="2 of 6"):
        restore(tmp_path / "nf4", jpeft.nf4(base(), block=32))
    with pytest.raises(BaseMismatchError, match="2 of 6"):
        restore(tmp_path / "nf4", jpeft.nf4(jax.tree.map(lambda x: 2 * x if x.shape == (64, 64) else x, base())))
    served = restore(tmp_path / "plain", jpeft.nf4(base()), check_base=False)
    assert_same(served, quantized)  # of the same random numbers


def test_codes_of_a_kernel_that_no_adapter_uses_count(tmp_path):
    ground = jpeft.int8(base())
    save(tmp_path, trained(ground, jpeft.bitfit()))
    other = jpeft.int8(jax.tree.map(lambda x: 2 * x if x.ndim == 2 and x.shape[1] == 64 else x, base()))
    with pytest.raises(BaseMismatchError, match=r"2 of 6 (.|\n)*layers_0/kernel, Int8"):
        restore(tmp_path, other)


# Files.


def test_overwrite(tmp_path):
    first, second = map(adapted, (2, 3))
    save(tmp_path / "run/adapter", first)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save(tmp_path / "run/adapter", second)
    assert_same(restore(tmp_path / "run/adapter", base()), first)
    for params in (second, first, first):
        save(str(tmp_path / "run/adapter"), params, overwrite=True)
        assert_same(restore(str(tmp_path / "run/adapter"), base()), params)
        assert len(list((tmp_path / "run/adapter").iterdir())) == 2


def test_other_directories_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("all my work")
    with pytest.raises(FileExistsError, match=r"is no checkpoint: it holds thesis.tex"):
        save(tmp_path, adapted(), overwrite=True)
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(NotADirectoryError):
        save(tmp_path / "thesis.tex", adapted(), overwrite=True)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        restore(tmp_path / "nowhere", base())
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        restore(tmp_path, base())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("where", ["Orbax starts", "Orbax writes", "manifest", "commit"])
def test_interrupted_save(tmp_path, monkeypatch, where, there, error):
    old, new = map(adapted, (2, 3))
    if there:
        save(tmp_path, old)

    def stop(*args, **kwargs):
        raise error

    owner, name = {
        "Orbax starts": (ocp.StandardCheckpointer, "save"),
        "Orbax writes": (ocp.StandardCheckpointHandler, "async_save"),
        "manifest": (_storage, "flush"),
        "commit": (os, "replace"),
    }[where]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop)
        with pytest.raises(error if isinstance(error, type) else type(error)):
            save(tmp_path, new, overwrite=True)
    if there:
        assert_same(restore(tmp_path, base()), old)
    else:
        with pytest.raises(CheckpointError, match="interrupted"):
            restore(tmp_path, base())
    save(tmp_path, new, overwrite=there)
    assert_same(restore(tmp_path, base()), new)
    assert len(list(tmp_path.iterdir())) == 2


def test_what_a_killed_save_left_is_swept(tmp_path):
    params = adapted()
    for left in ("arrays-1.orbax-checkpoint-tmp", "arrays-0"):
        (tmp_path / left / "d").mkdir(parents=True)
    (tmp_path / "manifest.json.new").write_text("{")
    save(tmp_path, params)
    assert_same(restore(tmp_path, base()), params)
    assert sorted(os.listdir(tmp_path)) == ["arrays-0", "manifest.json"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint, its files as bytes, and the tree."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoint"
    params = trained(base(), jpeft.lora(rank=2), jpeft.bitfit())
    save(directory, params)
    return directory, {f.relative_to(directory): f.read_bytes() for f in directory.rglob("*") if f.is_file()}, params


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_corruption_is_never_silent(saved, data):
    """Whatever happens to one file, the tree comes back exact or not at all."""
    directory, files, params = saved
    shutil.rmtree(directory)
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    name = data.draw(st.sampled_from(sorted(files)))
    content = bytearray(files[name])
    match data.draw(st.sampled_from(["flip", "overwrite", "truncate", "extend", "remove"])):
        case "flip":
            place = data.draw(st.integers(0, len(content) - 1))
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        case "overwrite":
            place = data.draw(st.integers(0, len(content) - 1))
            content[place : place + 16] = data.draw(st.binary(min_size=16, max_size=16))
        case "truncate":
            del content[data.draw(st.integers(0, len(content) - 1)) :]
        case "extend":
            content += data.draw(st.binary(min_size=1, max_size=16))
        case "remove":
            content = None
    (directory / name).unlink()
    if content is not None:
        (directory / name).write_bytes(content)
    try:
        found = restore(directory, base())
    except CheckpointError:
        return
    assert_same(found, params)


def test_damage_is_named(tmp_path):
    save(tmp_path, adapted())
    first, second = sorted(f for f in (tmp_path / "arrays-0").rglob("*") if f.is_file())[:2]
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    with pytest.raises(CheckpointError) as error:
        restore(tmp_path, base())
    assert f"{first} is damaged" in str(error.value) and f"{second} is missing" in str(error.value)


def test_arrays_that_are_read_otherwise_are_named(tmp_path):
    """Should a file be what it was and Orbax read another array from it."""
    save(tmp_path, adapted())
    reseal(tmp_path, lambda text: re.sub(r'(kernel/a": .*?"sum": ")\w+', r"\g<1>0123456789abcdef", text, count=1))
    with pytest.raises(CheckpointError, match=r"1 of 4 arrays .* than written: layers_0/kernel/a float32\[64, 2\]"):
        restore(tmp_path, base(), check_base=False)


def test_edited_manifest(tmp_path):
    save(tmp_path, adapted())
    file = tmp_path / "manifest.json"
    file.write_text(file.read_text().replace('"scale":1.0', '"scale":9.0'))
    with pytest.raises(CheckpointError, match="damaged, or was edited"):
        restore(tmp_path, base())


@pytest.mark.parametrize("name", ["this:C", "somebody.peft:Fancy", "builtins:eval", "jpeft._node:Node", "os:system"])
def test_no_class_is_taken_from_a_file(tmp_path, name):
    save(tmp_path, adapted())
    reseal(tmp_path, lambda text: text.replace("jpeft:LoRA", name))
    with pytest.raises(CheckpointError, match=rf"not known here: {name}. (.|\n)*import {name.partition(':')[0]}\."):
        restore(tmp_path, base())
    assert "this" not in sys.modules


def test_other_format_and_fields(tmp_path):
    save(tmp_path, adapted())
    reseal(tmp_path, lambda text: text.replace('"dropout": 0.0', '"speed": 0.0'))
    with pytest.raises(CheckpointError, match=r"layers_0/kernel: its class has other fields (.|\n)*speed"):
        restore(tmp_path, base())
    reseal(tmp_path, lambda text: text.replace('"format": 1', '"format": 2'))
    with pytest.raises(CheckpointError, match="format 2"):
        restore(tmp_path, base())


# Checksums.


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_checksum_sees_every_bit_and_place(data):
    dtype = data.draw(st.sampled_from([np.uint8, np.float16, np.float32, np.int32, np.bool_]))
    x = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 2, (3, 8)).astype(dtype)
    y = x.copy()
    if dtype == np.bool_:
        y.flat[data.draw(st.integers(0, 23))] ^= True
    else:
        flat = y.reshape(-1).view(np.uint8)
        flat[data.draw(st.integers(0, flat.size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert checksum(x) == checksum(x.copy())
    assert checksum(x) != checksum(y)


def test_checksum_sees_order_and_not_the_type_of_array():
    x = jnp.arange(24.0).reshape(4, 6)
    assert checksum(x) == checksum(np.asarray(x)) != checksum(x[::-1])
    assert len({checksum(jnp.zeros(n)) for n in range(1, 9)}) == 8
    with pytest.raises(TypeError, match="key_data"):
        checksum(jax.random.key(0))


SHARDED = """
import sys, jax, jax.numpy as jnp, jpeft
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jpeft._checksum import checksum
from jpeft._checkpoint import save

x = jnp.arange(64 * 64.0).reshape(64, 64)
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        for spec in (P("a", "b"), P(None, "a"), P(("b", "a"))):
            print(checksum(jax.device_put(x, NamedSharding(mesh, spec))))
w = jax.device_put(x, NamedSharding(mesh, P("a", "b")))
a, b = (jax.device_put(x[i : i + 2], NamedSharding(mesh, P(None, "a"))) for i in (0, 2))
save(sys.argv[1], {"w": jpeft.LoRA(base=w, a=a.T, b=b, scale=1.0)})
"""


def test_checksums_and_checkpoints_are_of_no_sharding(tmp_path):
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    run = [sys.executable, "-c", SHARDED, str(tmp_path)]
    printed = subprocess.run(run, env=env, check=True, capture_output=True, text=True).stdout.split()
    x = jnp.arange(64 * 64.0).reshape(64, 64)
    assert printed == [checksum(x)] * 6
    assert_same(restore(tmp_path, {"w": x}), {"w": jpeft.LoRA(base=x, a=x[:2].T, b=x[2:4], scale=1.0)})


def test_classes_may_move(tmp_path):
    """A file names the package that has a class, and not the module within it."""
    save(tmp_path, trained(base(), jpeft.chain(jpeft.lora(targets=".*kernel"), jpeft.unfreeze(targets=".*bias"))))
    written = (tmp_path / "manifest.json").read_text()
    assert '"jpeft:LoRA"' in written and '"jpeft:Free"' in written and "jpeft." not in written
