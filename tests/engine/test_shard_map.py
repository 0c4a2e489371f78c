"""`shard_map`: JAX's devices are fixed once it has started, so these tests run in a process of their own."""

import os
import pathlib
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_shard_map():
    tests = pathlib.Path(__file__).with_name("sharded_constructs.py")
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", str(tests)]
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=os.environ | devices, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
