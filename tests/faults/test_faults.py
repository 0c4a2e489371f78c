"""The programs that break checkpoints, a few times each: `make faults` runs them at full count."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


HERE = Path(__file__).parent


def run(program, *options):
    """What a program of this directory prints last."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, str(HERE / program), *map(str, options)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_killed(mode):
    assert run("kill.py", "--count", 4, "--mode", mode, "--seed", 1).endswith("faults: 0")


@pytest.mark.slow
def test_corrupted():
    assert run("corrupt.py", "--count", 100, "--seed", 1) == "corruptions: 100, faults: 0"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount a small disk")
def test_disk_full():
    last = run("full_disk.py", "--count", 8, "--seed", 1)
    assert last.startswith("levels: 8") and last.endswith("faults: 0") and "'raised': 0" not in last


@pytest.mark.slow
def test_two_writers():
    assert run("writers.py", "--count", 4, "--seed", 1).endswith("faults: 0")
