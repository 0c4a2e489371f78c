"""On a mesh of four devices; run by test_run in a process of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jpeft


def loss(params, x):
    return jnp.sum(jnp.tanh(jpeft.apply(lambda params, x: x @ params["w"], params, x)))


@pytest.mark.parametrize("run", [jpeft.fisher, jpeft.gradient_scores, jpeft.capture_inputs])
def test_goes_on_and_finds_what_one_device_does(run, tmp_path):
    """Weights and batches are sharded along different axes."""
    assert jax.device_count() == 4
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    w = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    batches = list(np.random.default_rng(1).normal(size=(5, 4, 8)).astype(np.float32))
    params, sharded = {"w": put(w, None, "model")}, [put(x, "data") for x in batches]
    expected = run(loss, params, sharded, targets="w")

    def interrupted():
        yield from sharded[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(loss, params, interrupted(), targets="w", resume=tmp_path / "pass", save_every=2)
    found = run(loss, params, sharded, targets="w", resume=tmp_path / "pass")
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    alone = run(loss, {"w": jnp.asarray(w)}, batches, targets="w")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), found, alone)
