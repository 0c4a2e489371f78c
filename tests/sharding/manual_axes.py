"""Steps written with `shard_map`: `test_sharding.py` runs this file in a process with eight devices."""

import jax
import numpy as np
import pytest
from collectives import collectives, size
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from methods import METHODS
from sharded_methods import DATA, loss_of, tuned
from sharded_steps import IDS, base, mesh_of

import jpeft
from jpeft.testing import shaken


def step(loss, mesh):
    """The loss and its gradient of rows which every part of `data` has of its own."""

    def on_rows(trainable, frozen, rows):
        own = jax.tree.map(lambda x: jax.lax.pcast(x, "data", to="varying"), trainable)
        return jax.lax.pmean(jax.value_and_grad(loss)(own, frozen, rows), "data")

    specs = P(), P(), P("data")
    return jax.jit(jax.shard_map(on_rows, mesh=mesh, in_specs=specs, out_specs=P()))


def assert_close(found, expected):
    scale = max(np.abs(x).max() for x in jax.tree.leaves(expected[1]))
    for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_of_every_method_what_trains_is_moved(method):
    """The loss and the gradients are those of one device, and what is moved is both, exactly."""
    model, params = tuned(method)
    trainable, frozen = jpeft.partition(params)
    whole, rows = NamedSharding(DATA, P()), NamedSharding(DATA, P("data"))
    inputs = jax.device_put((trainable, frozen, model.args), (whole, whole, rows))
    compiled = step(loss_of(model), DATA).lower(*inputs).compile()
    found = collectives(compiled)
    assert found.keys() == {"all-reduce"}
    assert size(found["all-reduce"]) == sum(x.nbytes for x in jax.tree.leaves(trainable)) + 4
    assert_close(compiled(*inputs), jax.jit(jax.value_and_grad(loss_of(model)))(trainable, frozen, model.args))


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("scan", [False, True])
def test_decoder(scan, quantized):
    mesh, (model, params, sites) = mesh_of("data"), base(scan)
    tuned = jpeft.lora(jpeft.nf4(params, block=16, sites=sites) if quantized else params, rank=8, sites=sites)
    trainable, frozen = jpeft.partition(tuned)
    trainable = shaken(trainable, jax.random.key(1))

    def loss(trainable, frozen, ids):
        return (jpeft.apply(model, {"params": jpeft.combine(trainable, frozen)}, ids) ** 2).mean()

    expected = jax.jit(jax.value_and_grad(loss))(trainable, frozen, IDS)
    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    inputs = jax.device_put((trainable, frozen, IDS), (whole, whole, rows))
    with jax.set_mesh(mesh):
        compiled = step(loss, mesh).lower(*inputs).compile()
    found, adapters = collectives(compiled), sum(x.nbytes for x in jax.tree.leaves(trainable))
    assert found.keys() == {"all-reduce"} and size(found["all-reduce"]) == adapters + 4
    assert_close(compiled(*inputs), expected)
