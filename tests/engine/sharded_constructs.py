"""Constructs of `shard_map`, on eight devices: `test_shard_map.py` runs this file in a process that has them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from constructs import normal
from function_constructs import layers, matrix
from jax import lax
from jax.sharding import PartitionSpec as P
from test_constructs import check

import jpeft


D = 8
X = normal(4, D)


def mapped(run, x, w, out, **how):
    """`run(x, w)` by `shard_map`, with the specifications of its inputs and of its output."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
    run = jax.shard_map(run, mesh=mesh, in_specs=(x, w), out_specs=out, **how)
    return lambda w, x: run(x, w)


def summed(x, w):
    return lax.psum(x @ w, "model")


def scanned(x, ws):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]


matrix = partial(matrix, args=(X,))
whole = P("data")
SHARDED = {
    "replicated": matrix(mapped(jnp.matmul, whole, P(), whole), shape=(D, 12)),
    "by outputs": matrix(mapped(jnp.matmul, whole, P(None, "model"), P("data", "model")), shape=(D, 12)),
    "by outputs, unchecked": matrix(
        mapped(jnp.matmul, whole, P(None, "model"), P("data", "model"), check_vma=False), shape=(D, 12)
    ),
    "by inputs": matrix(mapped(summed, P("data", "model"), P("model"), whole), shape=(D, 12)),
    "by inputs and outputs": matrix(
        mapped(lambda x, w: lax.psum(x @ w, "data"), P(None, "data"), P("data", "model"), P(None, "model")),
        shape=(D, 12),
    ),
    "by heads": matrix(
        mapped(partial(jnp.einsum, "ti,iho->tho"), whole, P(None, "model"), P("data", "model")), "ioo", shape=(D, 4, 3)
    ),
    "by two axes at once": matrix(
        mapped(jnp.matmul, P(), P(None, ("data", "model")), P(None, ("data", "model"))), shape=(D, 16)
    ),
    "transposed before": matrix(
        lambda w, x: mapped(jnp.matmul, whole, P(None, "model"), P("data", "model"))(w.T, x), "oi", shape=(12, D)
    ),
    "reshaped before": matrix(
        lambda w, x: mapped(partial(jnp.einsum, "ti,iho->tho"), whole, P(), whole)(w.reshape(D, 4, 3), x), shape=(D, 12)
    ),
    "scaled before": matrix(
        lambda w, x: mapped(jnp.matmul, whole, P(None, "model"), P("data", "model"))(w / 2, x), shape=(D, 12)
    ),
    "experts": matrix(
        mapped(partial(jnp.einsum, "eti,eio->eto"), P("model"), P("model"), P("model")),
        "sio",
        shape=(4, D, 3),
        args=(normal(4, 2, D),),
    ),
    "layers": matrix(mapped(scanned, whole, P(), whole), "sio", shape=(3, D, D)),
    "in a loop": layers(
        lambda ws, x: lax.scan(lambda x, w: (mapped(jnp.matmul, whole, P(), whole)(w, x), None), x, ws)[0]
    ),
    "a loop inside remat": matrix(mapped(jax.checkpoint(scanned), whole, P(), whole), "sio", shape=(3, D, D)),
}


def test_every_device_drops_for_itself():
    """Where all of them have the same input and kernel."""
    x, params = jnp.ones((1, 64)), jpeft.lora({"w": jnp.zeros((64, 64))}, rank=64, dropout=0.5, targets="w")
    params = {"w": params["w"].replace(a=jnp.eye(64), b=jnp.eye(64))}
    run = mapped(jnp.matmul, P(), P(), P(("data", "model")), check_vma=False)
    y = jpeft.apply(lambda params, x: run(params["w"], x), params, x, rngs=jax.random.key(0))
    assert len({row.tobytes() for row in np.asarray(y)}) == 8


@pytest.mark.parametrize("name", SHARDED)
def test_shard_map(name):
    assert jax.device_count() == 8
    check(SHARDED[name])
