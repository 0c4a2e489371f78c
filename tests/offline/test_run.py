"""The runner of offline passes: one compilation, one carry, and interruptions that change nothing."""

import io
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.offline._run import compiled, run, shown


PARAMS = {"kernel": jnp.arange(6.0).reshape(3, 2)}
BATCHES = [np.random.default_rng(n).normal(size=(4, 3)).astype(np.float32) for n in range(7)]


def loss(params, x):
    return jnp.sum(jnp.sin(x @ params["kernel"]))


def scores(batches, params=PARAMS, **how):
    return jpeft.gradient_scores(loss, params, batches, **how)["kernel"]


def interrupted(batches, after):
    """Batches that end in an interruption, as a generator has it."""
    yield from batches[:after]
    raise KeyboardInterrupt


def broken_off(directory, after, **how):
    with pytest.raises(KeyboardInterrupt):
        scores(interrupted(BATCHES, after), resume=directory, **how)


def test_streams_and_compiles_once_for_every_shape():
    shapes, ended = [], []

    @compiled
    def step(total, params, batch):
        shapes.append(batch.shape)
        return total + jnp.sum(batch) * params

    def batches():
        for n in (2, 2, 2, 1):
            yield np.full((n,), 1.0, np.float32)
            ended.append(n)

    total = run(step, start := jnp.zeros(()), jnp.float32(3), batches(), what="test", options={})
    assert float(total) == 3 * 7
    assert shapes == [(2,), (1,)] and ended == [2, 2, 2, 1]
    assert start.is_deleted()  # its memory is that of the carry after it


def test_no_batches():
    with pytest.raises(ValueError, match="`gradient_scores` has no batches"):
        scores([])


@pytest.mark.parametrize("after", [2, 3, 5])
def test_goes_on_where_it_was_interrupted(tmp_path, after):
    """Bitwise the same, and what was done is not done again: those batches may now be anything but the last."""
    expected = scores(BATCHES)
    broken_off(tmp_path / "pass", after, save_every=2)
    done = after // 2 * 2
    rest = [np.full((1, 1), np.nan, np.float32)] * (done - 1) + BATCHES[done - 1 :]
    np.testing.assert_array_equal(scores(rest, resume=tmp_path / "pass", save_every=2), expected)
    assert np.isfinite(expected).all() and np.abs(expected).min() > 1e-3


def test_interrupted_before_the_first_save(tmp_path):
    broken_off(tmp_path / "pass", 1, save_every=2)
    np.testing.assert_array_equal(scores(BATCHES, resume=tmp_path / "pass"), scores(BATCHES))


def test_a_pass_that_is_done_stays_and_takes_more(tmp_path):
    first = scores(BATCHES[:3], resume=tmp_path / "pass")
    seen = [np.full((1, 1), np.nan, np.float32)] * 2 + BATCHES[2:3]
    np.testing.assert_array_equal(scores(seen, resume=tmp_path / "pass"), first)
    np.testing.assert_array_equal(scores(BATCHES, resume=tmp_path / "pass"), scores(BATCHES))


def test_an_interruption_while_it_is_saved_leaves_the_last_save(tmp_path, monkeypatch):
    broken_off(tmp_path / "pass", 2, save_every=2)
    with monkeypatch.context() as patch:
        patch.setattr("jpeft._storage.os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        broken_off(tmp_path / "pass", 7, save_every=2)
    np.testing.assert_array_equal(scores(BATCHES, resume=tmp_path / "pass"), scores(BATCHES))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: scores(BATCHES, {"kernel": PARAMS["kernel"] + 1}, resume=d), r"other parameters: \['kernel'\]"),
        (lambda d: scores(BATCHES, jpeft.delta(PARAMS), resume=d), r"other nodes: \['kernel'\]"),
        (lambda d: scores(BATCHES, clip=1.0, resume=d), "other options: clip"),
        (lambda d: scores(BATCHES, squared=True, clip=2.0, resume=d), "other options: squared, clip"),
        (lambda d: jpeft.fisher(loss, PARAMS, BATCHES, resume=d), "had pass gradient_scores, not fisher"),
        (lambda d: scores([BATCHES[0], *BATCHES], resume=d), "has seen other batches"),
        (lambda d: scores(BATCHES[:1], resume=d), "had 2 batches, not 1"),
    ],
)
def test_refuses_what_another_pass_has_left(tmp_path, change, message):
    broken_off(tmp_path / "pass", 3, save_every=2)
    with pytest.raises(ValueError, match=f"pass holds another pass: .*{message}.*Name another directory"):
        change(tmp_path / "pass")


def test_refuses_nodes_of_other_numbers(tmp_path):
    """Those of their static fields: the arrays are the same."""
    scores(BATCHES, jpeft.lora(PARAMS, rank=1, alpha=1.0), resume=tmp_path / "pass")
    with pytest.raises(ValueError, match=r"it had other nodes: \['kernel'\]\. Name"):
        scores(BATCHES, jpeft.lora(PARAMS, rank=1, alpha=2.0), resume=tmp_path / "pass")


def test_refuses_a_directory_of_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        scores(BATCHES, resume=tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_bar_on_a_terminal_alone(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert list(shown([1, 2], "fisher", True)) == [1, 2]
    assert "fisher" in terminal.getvalue() and "100%" in terminal.getvalue()
    assert shown(BATCHES, "fisher", False) is BATCHES
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert shown(BATCHES, "fisher", True) is BATCHES


def test_unknown_option():
    with pytest.raises(TypeError, match="progres"):
        scores(BATCHES, progres=False)


@pytest.mark.slow
def test_on_a_mesh():
    """JAX's devices are fixed once it has started: these tests run in a process of their own."""
    tests = Path(__file__).with_name("sharded_passes.py")
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", str(tests)]
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=os.environ | devices, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_kept_of_a_sharded_carry_is_sharded(tmp_path):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    step = lambda total, params, batch: total + jnp.sum(batch)
    how = {"what": "test", "options": {}, "resume": tmp_path / "pass"}
    go = lambda: run(step, jax.device_put(jnp.zeros(()), whole), {}, [jnp.ones(2)], **how)
    assert go().sharding == go().sharding == whole
