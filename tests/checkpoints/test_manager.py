"""Checkpoints of training: all of a step comes back, and nothing that is not."""

import json
import os
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import jpeft
from jpeft import CheckpointError, CheckpointManager, SaveSkippedError, TreeMismatchError
from jpeft._training_state import TrainingState


TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
METHODS = {
    "lora": jpeft.lora(rank=2),
    "nf4": jpeft.chain(jpeft.nf4(), jpeft.lora(rank=2)),
    "shared": jpeft.vera(rank=2, targets="up/kernel"),
    "beside": jpeft.chain(jpeft.bottleneck(width=2, targets="up"), jpeft.unfreeze(targets="head/.*")),
}


def base(seed=0):
    random = np.random.default_rng(seed)
    array = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    return {"up": {"kernel": array(8, 8), "bias": array(8)}, "head": {"kernel": array(8, 2)}}


def noise(tree, seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(100 * random.normal(size=x.shape), x.dtype), tree)


def start(method="lora", tx=TX):
    params = METHODS[method](base())
    return params, tx.init(jpeft.partition(params)[0])


def after(step, params, opt_state):
    trainable, frozen = jpeft.partition(params)
    return jpeft.combine(noise(trainable, step), frozen), noise(opt_state, step)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert jax.tree.leaves(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def saved(directory, *steps, trees=None, **options):
    """A directory with these steps; the trees before any."""
    trees = start() if trees is None else trees
    with CheckpointManager(directory, **options) as manager:
        for step in steps:
            manager.save(step, *after(step, *trees))
    return trees


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_exact(tmp_path, method, asynchronous):
    trees = start(method)
    new, key = after(3, *trees), jax.random.key(5, impl="rbg")
    with CheckpointManager(tmp_path / "new/run", asynchronous=asynchronous) as manager:
        assert manager.restore(*trees) is None and manager.steps == ()
        manager.save(3, *new, key=key, data={"next": [1, 2.5, None], "10": {"b": 1, "a": "é"}})
        manager.wait()
        assert manager.steps == (3,)
    with CheckpointManager(tmp_path / "new/run", read_only=True) as manager:
        found = manager.restore(*trees)
    assert found.step == 3 and found.skipped == ()
    assert_same((found.params, found.opt_state), new)
    assert found.key.dtype == key.dtype and (jax.random.key_data(found.key) == jax.random.key_data(key)).all()
    assert found.data == {"next": [1, 2.5, None], "10": {"b": 1, "a": "é"}}


OPTIMIZERS = {
    "accumulated": optax.MultiSteps(TX, 2),
    "masked": optax.masked(optax.adam(1e-3), lambda tree: jax.tree.map(lambda x: x.shape[0] == 8, tree)),
    "labelled": optax.partition({"a": optax.adamw(1e-3, mu_dtype=jnp.bfloat16), "b": optax.sgd(1.0)}, lambda _: "a"),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
    "with a key": optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3)), optax.sgd(1e-3)),
    "without a state": optax.identity(),
}


@pytest.mark.parametrize("tx", OPTIMIZERS)
def test_states_of_optimizers(tmp_path, tx):
    params, opt_state = start(tx=OPTIMIZERS[tx])
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    raw = lambda tree: jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)
    gradients = noise(jpeft.partition(params)[0], 1)
    with jax.numpy_dtype_promotion("standard"):  # Optax promotes
        opt_state = OPTIMIZERS[tx].update(gradients, opt_state, jpeft.partition(params)[0])[1]
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, params, opt_state, key=jax.random.PRNGKey(4))
        found = manager.restore(*start(tx=OPTIMIZERS[tx]))
    assert_same(found.key, jax.random.PRNGKey(4))
    assert_same((found.params, raw(found.opt_state)), (params, raw(opt_state)))
    assert [x.dtype for x in jax.tree.leaves(found.opt_state)] == [x.dtype for x in jax.tree.leaves(opt_state)]


def test_odd_leaves(tmp_path):
    """No elements, names that Orbax takes for one, dtypes of few bits."""
    params = {"a": {"b": jpeft.Free(array=jnp.ones(3))}, "a.b": jpeft.Free(array=jnp.zeros((0, 2)))}
    state = {"a": {"b": jnp.ones(2, jnp.int4)}, "a.b": jnp.array([True, False]), "c": np.float32(2), "d": None, "e": {}}
    with CheckpointManager(tmp_path) as manager:
        manager.save(0, params, state)
        found = manager.restore(params, state)
    assert_same((found.params, found.opt_state), (params, state))
    assert found.key is None and found.data is None


def test_abstract_leaves(tmp_path):
    """What trains may be told of alone; what does not train may not, and nothing abstract comes back."""
    params, opt_state = saved(tmp_path, 1)
    abstract = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    trainable, frozen = jpeft.partition(params)
    with CheckpointManager(tmp_path, read_only=True) as manager:
        found = manager.restore(jpeft.combine(abstract(trainable), frozen), abstract(opt_state))
        assert_same((found.params, found.opt_state), after(1, params, opt_state))
        with pytest.raises(TreeMismatchError, match=r"up/bias, .* when saved, abstract float32"):
            manager.restore(abstract(params), opt_state)


def test_shardings_are_those_of_the_trees(tmp_path):
    mesh = jax.make_mesh((1,), ("x",))
    on = jax.NamedSharding(mesh, jax.P("x"))
    params, opt_state = saved(tmp_path, 1)
    placed = jax.tree.map(lambda x: jax.device_put(x, on) if x.ndim else x, opt_state)
    told = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on if x.ndim else None), opt_state)
    with CheckpointManager(tmp_path, read_only=True) as manager:
        for like in (placed, told):
            found = manager.restore(params, like).opt_state
            assert [x.sharding for x in jax.tree.leaves(found) if x.ndim] == [on] * 4
            assert not [x for x in jax.tree.leaves(found) if not x.ndim and x.committed]
            assert_same(found, after(1, params, opt_state)[1])


def test_which_steps_are_kept(tmp_path):
    losses = [3.0, 1.0, float("nan"), 2.0, -float("inf"), 5.0]
    trees = start()
    for mode, best, kept in (("min", 2, (2, 5, 6)), ("max", 6, (5, 6))):
        with CheckpointManager(tmp_path / mode, keep=2, best="loss", mode=mode) as manager:
            for step, loss in enumerate(losses, 1):
                manager.save(step, *after(step, *trees), metrics={"loss": loss, "other": -loss})
            manager.wait()
            assert (manager.steps, manager.best_step) == (kept, best)
        with CheckpointManager(tmp_path / mode, keep=2, best="loss", mode=mode) as manager:
            assert manager.best_step == best  # also of a run that goes on
            manager.save(7, *after(7, *trees))
            manager.wait()
            assert manager.steps == tuple(sorted({best, 6, 7}))
        assert sorted(os.listdir(tmp_path / mode)) == [".writer", *map(str, manager.steps)]


# What is refused.


def test_every_mismatch_at_once(tmp_path):
    params, opt_state = saved(tmp_path, 1)
    other = jpeft.lora(base(), rank=3, alpha=7, targets="up/kernel")
    other["up"]["bias"] = other["up"]["bias"].at[0].add(1e-6)
    other["tail"] = {"bias": jnp.ones(3)}
    state = optax.sgd(1e-3, momentum=0.9, accumulator_dtype=jnp.bfloat16).init(jpeft.partition(other)[0])
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(TreeMismatchError) as error:
            manager.restore(other, state)
        lines = str(error.value).splitlines()
        assert "in 12 places" in lines[0] and len(lines) == 13
        for start_of_line in (
            'changed: up/kernel, jpeft:LoRA {"axes":"io","dropout":0.0,"scale":1.0} when saved',
            "unexpected: tail/bias, float32 (3,)",
            "changed: up/bias, float32 (8,) with the checksum",
            "changed: params/up/kernel/a, float32 (8, 2) when saved, float32 (8, 3) now",
            "missing: opt_state/1/0/count, int32 ()",
            "unexpected: opt_state/0/trace/up/kernel/a, bfloat16 (8, 3)",
        ):
            assert any(line.startswith(f"  {start_of_line}") for line in lines), start_of_line
        assert manager.restore(params, opt_state).step == 1


@pytest.mark.parametrize(
    ("change", "what"),
    {
        "base": (lambda t: t | {"up": t["up"] | {"bias": t["up"]["bias"] + 1}}, "changed: up/bias"),
        "constant": (lambda t: t | {"up": t["up"] | {"kernel": t["up"]["kernel"].replace(scale=3.0)}}, "changed: up"),
        "class": (lambda t: t | {"head": {"kernel": jpeft.Free(array=jnp.ones((8, 2)))}}, "jpeft:Free"),
        "dtype": (lambda t: jax.tree.map(lambda x: x.astype(jnp.bfloat16), t), "float32 .* bfloat16"),
        "key": (lambda t: t | {"more": t["head"]}, "unexpected: more/kernel"),
        "quantized": (lambda t: jpeft.lora(jpeft.nf4(jpeft.strip(t)), rank=2), "unexpected: up/kernel/base, jpeft:NF4"),
    }.values(),
)
def test_one_mismatch(tmp_path, change, what):
    params, opt_state = saved(tmp_path, 1)
    with CheckpointManager(tmp_path) as manager, pytest.raises(TreeMismatchError, match=what):
        manager.restore(change(params), opt_state)
    assert manager.steps == (1,)


def test_which_adapter_acts_is_no_mismatch(tmp_path):
    one = jpeft.lora(base(), rank=2)
    params = jpeft.stack({"a": one, "b": one})
    state = TX.init(jpeft.partition(params)[0])
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, params, state)
        assert manager.restore(jpeft.activate(params, "a"), state).step == 1


def test_steps_go_up(tmp_path):
    trees = saved(tmp_path, 2, 5)
    with CheckpointManager(tmp_path) as manager:
        assert manager.restore(*trees, step=2).step == 2
        for step in (2, 3, 4, 5):
            with pytest.raises(SaveSkippedError, match=f"Step {step} is not saved: .* has step 5"):
                manager.save(step, *trees)
        with pytest.raises(FileNotFoundError, match="no step 3: it has 2, 5"):
            manager.restore(*trees, step=3)
        manager.save(6, *trees)


def test_what_cannot_be_saved(tmp_path):
    params, opt_state = start()
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(TypeError, match=r"opt_state/1, float\n  opt_state/2, str"):
            manager.save(1, params, (opt_state, 0.1, "adam"))
        with pytest.raises(TypeError, match="bytes is not JSON serializable"):
            manager.save(1, params, opt_state, data=b"state")
        manager.save(1, params, opt_state)


class Twins:
    """A tree whose leaves have one name."""


jax.tree_util.register_pytree_with_keys(
    Twins,
    lambda _: (((jax.tree_util.DictKey("x"), jnp.ones(1)), (jax.tree_util.GetAttrKey("x"), jnp.ones(1))), None),
    lambda *_: Twins(),
)


def test_two_arrays_of_one_name():
    with pytest.raises(ValueError, match="one name: opt_state/x"):
        TrainingState({}, Twins())


# Damage.


def damage(file, how):
    {
        "removed": lambda: file.unlink(),
        "emptied": lambda: file.write_bytes(b""),
        "cut": lambda: file.write_bytes(file.read_bytes()[:-20]),
        "edited": lambda: file.write_text(file.read_text().replace('"rank', '"Rank').replace('"up', '"uq')),
    }[how]()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # reads that Orbax no longer waits for
@pytest.mark.parametrize("what", ["manifest/metadata", "state/d", "state/manifest.ocdbt"])
@pytest.mark.parametrize("how", ["removed", "emptied", "cut"])
def test_damaged_step(tmp_path, what, how):
    trees = saved(tmp_path, 1, 2, 3)
    file = tmp_path / "3" / what
    damage(next(file.iterdir()) if file.is_dir() else file, how)
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(CheckpointError, match=r"nothing to restore(.|\n)*Step 3: "):
            manager.restore(*trees, step=3)
        with pytest.warns(UserWarning, match=r"Step 2 is restored\. Step 3: "):
            found = manager.restore(*trees)
        assert found.step == 2 and len(found.skipped) == 1 and str(tmp_path / "3") in found.skipped[0]
        assert_same((found.params, found.opt_state), after(2, *trees))
        assert manager.steps == (1, 2) and (tmp_path / "3.damaged").is_dir()
        manager.save(3, *after(3, *trees))  # the run comes by it again
        assert manager.restore(*trees).skipped == ()


def test_step_under_another_number(tmp_path):
    trees = saved(tmp_path, 1, 2)
    shutil.copytree(tmp_path / "1", tmp_path / "3")
    said = pytest.warns(UserWarning, match=r"Step 3: .*/3/manifest.* is that of step 1")
    with CheckpointManager(tmp_path, read_only=True) as manager, said:
        assert manager.restore(*trees).step == 2
    assert manager.steps == (1, 2, 3)  # a reader changes nothing


def test_all_steps_damaged(tmp_path):
    trees = saved(tmp_path, 1, 2)
    for step in (1, 2):
        damage(tmp_path / f"{step}/manifest/metadata", "edited")
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(CheckpointError, match=r"nothing to restore.\nStep 2: .*\nStep 1: "):
            manager.restore(*trees)
        assert manager.steps == (1, 2)


def test_emptied_step_and_strange_names_do_not_block(tmp_path):
    """Orbax's own manager can then neither restore nor save."""
    trees = saved(tmp_path, 1, 2)
    shutil.rmtree(tmp_path / "2")
    for name in ("2", "3.orbax-checkpoint-tmp", "junk", ".trash"):
        (tmp_path / name).mkdir()
    with CheckpointManager(tmp_path) as manager:
        with pytest.warns(UserWarning, match="Step 2: "):
            assert manager.restore(*trees).step == 1
        manager.save(3, *after(3, *trees))
        assert manager.restore(*trees).step == 3
    assert sorted(os.listdir(tmp_path)) == [".writer", "1", "2.damaged", "3", "junk"]


def test_manifest_tells_everything(tmp_path):
    saved(tmp_path, 4)
    manifest = json.loads((tmp_path / "4/manifest/metadata").read_text())
    assert manifest["step"] == 4 and manifest["nodes"]["up/kernel"]["is"] == "jpeft:LoRA"
    assert set(manifest["versions"]) == {"jpeft", "jax", "flax", "optax", "orbax-checkpoint"}
    assert {name for name in manifest["base"] if name.startswith("up")} == {"up/kernel/base", "up/bias"}
    assert all(len(x["sum"]) == 16 for x in (manifest["arrays"] | manifest["base"]).values())


def test_what_a_transition_changes(tmp_path):
    """A mask does not train, and no base has it: it is saved; the base beneath, quantized, is not."""
    params = jpeft.adalora(jpeft.nf4(base(), block=4, targets="up/kernel"), rank=2, targets="up/kernel")
    opt_state = TX.init(jpeft.partition(params)[0])
    node = params["up"]["kernel"]
    pruned = params | {"up": params["up"] | {"kernel": node.replace(mask=node.mask.at[0].set(False))}}
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, pruned, opt_state)
        found = manager.restore(params, opt_state)
    assert_same(found.params, pruned)
    manifest = json.loads((tmp_path / "1/manifest/metadata").read_text())
    assert "params/up/kernel/mask" in manifest["arrays"] and "up/kernel/base/codes" in manifest["base"]


# Saves that fail, and other writers.


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # writes that Orbax no longer waits for
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("where", ["manifest", "flush"])
def test_failed_save(tmp_path, monkeypatch, where, asynchronous):
    trees = start()

    def full(*args):
        raise OSError(28, "No space left on device")

    async def full_later(*args):
        full()

    owner, name, new = {
        "manifest": (ocp.JsonCheckpointHandler, "_save_fn", full_later),
        "flush": (jpeft._steps, "flush", full),
    }[where]
    with CheckpointManager(tmp_path, best="loss", asynchronous=asynchronous) as manager:
        manager.save(1, *after(1, *trees), metrics={"loss": 2})
        manager.wait()
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, new)
            with pytest.raises(CheckpointError, match=r"Step 2 was not saved to .*No space left"):
                manager.save(2, *after(2, *trees), metrics={"loss": 1})
                manager.wait()
        found = manager.restore(*trees)
        assert (found.step, manager.steps, manager.best_step) == (1, (1,), 1)
        assert_same((found.params, found.opt_state), after(1, *trees))
        manager.save(2, *after(2, *trees))
        assert manager.restore(*trees).step == 2
    assert sorted(os.listdir(tmp_path)) == [".writer", "1", "2"]


def test_one_writer(tmp_path):
    trees = saved(tmp_path, 1)
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(CheckpointError, match=rf'is being written by another: .*"process": {os.getpid()}'):
            CheckpointManager(tmp_path)
        with CheckpointManager(tmp_path, read_only=True) as reader:
            assert reader.restore(*trees).step == 1
            with pytest.raises(CheckpointError, match="read_only"):
                reader.save(2, *trees)
        manager.save(2, *trees)
        (tmp_path / ".writer").write_text("another")
        with pytest.raises(CheckpointError, match="names another, not this process"):
            manager.save(3, *trees)
    with pytest.raises(CheckpointError, match="closed"):
        manager.save(3, *trees)
    CheckpointManager(tmp_path).close()


def test_arrays_may_be_donated_while_they_are_written(tmp_path):
    trees = start()
    new = after(1, *trees)
    expected = jax.tree.map(np.array, new)
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, *new)
        for x in jax.tree.leaves((jpeft.partition(new[0])[0], new[1])):
            x.delete()
        found = manager.restore(*trees)
    assert_same((found.params, found.opt_state), expected)


def test_boxed_base(tmp_path):
    boxed = jax.tree.map(lambda x: nn.Partitioned(x, names=(None,) * x.ndim), base())
    params = jpeft.lora(boxed, rank=2)
    trees = saved(tmp_path, 1, trees=(params, TX.init(jpeft.partition(params)[0])))
    with CheckpointManager(tmp_path) as manager:
        assert_same(manager.restore(*trees).params, after(1, *trees)[0])
