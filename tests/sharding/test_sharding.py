"""JAX's devices are fixed once it has started, so tests on eight of them run in processes of their own."""

import os
import pathlib
import subprocess
import sys

import pytest


HERE = pathlib.Path(__file__).parent
DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sharded_trees", "sharded_steps", "explicit_axes", "manual_axes", "sharded_methods"])
def test_on_eight_devices(name):
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", str(HERE / f"{name}.py")]
    done = subprocess.run(command, env=os.environ | DEVICES, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
