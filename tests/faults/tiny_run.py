"""A training run whose every step is known beforehand, for programs that break its checkpoints."""

import ctypes
import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jpeft


TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def trees() -> tuple[Any, Any]:
    """`params` and `opt_state` before any step."""
    random = np.random.default_rng(0)
    base = {name: {"kernel": jnp.float32(random.normal(size=(64, 64)))} for name in ("up", "down")}
    params = jpeft.lora(base, rank=16)  # arrays of 4 KiB: smaller ones have a checksum of Orbax
    return params, TX.init(jpeft.partition(params)[0])


def after(step: int, params: Any, opt_state: Any) -> tuple[Any, Any]:
    """The trees with what `step` has left in them: numbers that no other step has."""
    random = np.random.default_rng(step)
    new = lambda x: jnp.asarray(random.normal(size=x.shape) * 100, x.dtype)
    trainable, frozen = jpeft.partition(params)
    return jpeft.combine(jax.tree.map(new, trainable), frozen), jax.tree.map(new, opt_state)


def save(manager: jpeft.CheckpointManager, step: int, params: Any, opt_state: Any) -> None:
    manager.save(step, *after(step, params, opt_state), key=jax.random.key(step), data={"next_index": step})


def check(found: jpeft.Restored, params: Any, opt_state: Any) -> None:
    """**Raises** `AssertionError` unless what was restored is exactly what its step has left."""
    expected = digest((*after(found.step, params, opt_state), jax.random.key_data(jax.random.key(found.step))))
    got = digest((found.params, found.opt_state, jax.random.key_data(found.key)))
    assert len(expected) == len(got) == 64
    assert got == expected and found.data == {"next_index": found.step}, f"step {found.step} is restored otherwise"


def digest(tree: Any) -> str:
    leaves = [np.asarray(x) for x in jax.tree.leaves(tree)]
    assert leaves
    return hashlib.sha256(b"".join(str((x.dtype, x.shape)).encode() + x.tobytes() for x in leaves)).hexdigest()


def start(fn: Callable[[], None]) -> int:
    """Run `fn` in a new process, and return its number. It has all that was imported, and its own devices."""
    if process := os.fork():
        return process
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with this one
        fn()
        os._exit(0)
    except BaseException as e:
        print(f"{type(e).__name__}: {e}", flush=True)
        os._exit(1)


def note(log: Path, line: str) -> None:
    """Append a line as a whole: one that is there was told before whatever came next."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{line}\n".encode())
    os.close(descriptor)


def noted(log: Path, word: str) -> list[int]:
    """The numbers of the lines that begin with a word."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [int(line.split()[1]) for line in lines if line.split()[0] == word]
