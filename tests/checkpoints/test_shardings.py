"""Checkpoints from one mesh to another, in a process of its own with eight devices."""

import os
import subprocess
import sys

import pytest


PROGRAM = """
import sys, jax, jax.numpy as jnp, numpy as np, optax, jpeft
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

host = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
tx, directory = optax.adam(1e-3), sys.argv[1]

def start(shape):
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    w = jax.device_put(host, NamedSharding(Mesh(devices, ("fsdp", "tensor")), P("fsdp", "tensor")))
    params = jpeft.lora({"up": {"kernel": w}}, rank=2)
    return params, tx.init(jpeft.partition(params)[0])

def same(x, y):
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), x, y))

def places(tree):
    return [x.sharding for x in jax.tree.leaves(tree) if x.ndim]

def moved(trees):
    # other numbers in all that trains
    params, opt_state = trees
    trainable, frozen = jpeft.partition(params)
    return jpeft.combine(jax.tree.map(lambda x: x + 1, trainable), frozen), opt_state

saved = moved(start((2, 4)))
jpeft.save(directory + "/adapter", saved[0])
with jpeft.CheckpointManager(directory + "/run") as manager:
    manager.save(1, *saved)
with jpeft.CheckpointManager(directory + "/run", read_only=True) as manager:
    for shape in ((2, 4), (4, 2), (1, 2), (1, 1)):
        params, opt_state = start(shape)
        found = manager.restore(params, opt_state)
        assert same((found.params, found.opt_state), saved)
        assert places(found[1:3]) == places((params, opt_state))
        adapter = jpeft.restore(directory + "/adapter", jpeft.strip(params))
        assert same(adapter, saved[0])
        alike = lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim)
        assert jax.tree.all(jax.tree.map(alike, adapter, params))
print("all of them")
"""


@pytest.mark.slow
def test_from_mesh_to_mesh(tmp_path):
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.stdout == "all of them\n", done.stderr[-4000:]
