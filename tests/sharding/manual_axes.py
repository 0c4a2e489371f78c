"""Steps written with `shard_map`: `test_sharding.py` runs this file in a process with eight devices."""

import jax
import pytest
from collectives import collectives, size
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from methods import METHODS
from sharded_methods import DATA, assert_close, loss_of, tuned
from sharded_steps import IDS, base, mesh_of

import jpeft
from jpeft.testing import shaken


def check(loss, mesh, trainable, frozen, args):
    """The loss and the gradients are those of one device, and what is moved is both, exactly."""

    def step(trainable, frozen, rows):  # which every part of `data` has of its own
        own = jax.tree.map(lambda x: jax.lax.pcast(x, "data", to="varying"), trainable)
        return jax.lax.pmean(jax.value_and_grad(loss)(own, frozen, rows), "data")

    expected = jax.jit(jax.value_and_grad(loss))(trainable, frozen, args)
    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    inputs = jax.device_put((trainable, frozen, args), (whole, whole, rows))
    with jax.set_mesh(mesh):
        step = jax.jit(jax.shard_map(step, in_specs=(P(), P(), P("data")), out_specs=P()))
        compiled = step.lower(*inputs).compile()
    found = collectives(compiled)
    assert found.keys() == {"all-reduce"}
    assert size(found["all-reduce"]) == sum(x.nbytes for x in jax.tree.leaves(trainable)) + 4
    assert_close(compiled(*inputs), expected)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method(method):
    model, params = tuned(method)
    check(loss_of(model), DATA, *jpeft.partition(params), model.args)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("scan", [False, True])
def test_decoder(scan, quantized):
    model, params, sites = base(scan)
    tuned = jpeft.lora(jpeft.nf4(params, block=16, sites=sites) if quantized else params, rank=8, sites=sites)
    trainable, frozen = jpeft.partition(tuned)

    def loss(trainable, frozen, ids):
        return (jpeft.apply(model, {"params": jpeft.combine(trainable, frozen)}, ids) ** 2).mean()

    check(loss, mesh_of("data"), shaken(trainable, jax.random.key(1)), frozen, IDS)
