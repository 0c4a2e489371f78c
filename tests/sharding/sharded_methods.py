"""Every method on a mesh: `test_sharding.py` runs this file in a process with eight devices."""

import jax
import numpy as np
import pytest
from collectives import collectives, size
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from methods import METHODS

import jpeft
from jpeft import models
from jpeft.testing import shaken, subject


NAMES = ("data", "fsdp", "tensor")
MESH = Mesh(np.array(jax.devices()).reshape(2, 2, 2), NAMES)
DATA = Mesh(np.array(jax.devices()[:2]).reshape(2, 1, 1), NAMES)


def tuned(method):
    model = subject(method.model)
    trainable, frozen = jpeft.partition(method.make(model.params, model.sites, jax.random.key(3)))
    return model, jpeft.combine(shaken(trainable, jax.random.key(4)), frozen)


def on(mesh, model, params):
    return jpeft.partition(jpeft.shard(params, jpeft.shardings(params, models.shardings(model.params, mesh))))


def loss_of(model):
    def loss(trainable, frozen, args):
        y = jpeft.apply(model.model, {"params": jpeft.combine(trainable, frozen)}, *args)
        return (y**2).mean()

    return loss


def slope(model, mesh):
    """The loss and its gradient, for rows of the batch on the devices of `data`."""
    args = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in model.args]
    return jax.jit(jax.value_and_grad(loss_of(model))), args


def assert_close(found, expected):
    """Losses with their gradients, which are compared with the largest of them."""
    scale = max(np.abs(x).max() for x in jax.tree.leaves(expected[1]))
    for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_divided_is_whole(method):
    """The loss and all gradients, with parameters, adapters and rows on eight devices, are those of one."""
    model, params = tuned(method)
    fn, _ = slope(model, DATA)
    expected = fn(*jpeft.partition(params), model.args)
    trainable, frozen = on(MESH, model, params)
    with jax.set_mesh(MESH):
        fn, args = slope(model, MESH)
        found = fn(trainable, frozen, args)
    assert_close(found, expected)


# What trains makes an array that is larger (a weight, the matrix of a shared projection, a prompt), and the gradient of
# that is what XLA sums over the devices. Within a `shard_map` it is as with the others.
LARGER = {
    "vera", "lora_xs", "tinylora", "tinylora_shared", "randlora", "hira", "loha", "lokr_both", "said", "did_dense",
    "fourierft", "fourierft_zeros", "road_1", "road_encoder", "oft", "oft_exact", "boft", "hra",
    "hra_orthogonal", "sparse", "shira", "spiel", "far", "tokens", "invertible", "compacter", "compacter_plus", "phm",
    "moe_lora", "moe_lora_top", "ladder", "intrinsic_prompt", "cpt",
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_gradients_move_what_trains_and_no_more(method):
    """Of rows on two devices: the bytes of what trains, and the loss."""
    model, params = tuned(method)
    trainable, frozen = on(DATA, model, params)
    whole = NamedSharding(DATA, P())
    with jax.set_mesh(DATA):
        fn, args = slope(model, DATA)
        fn = jax.jit(fn, out_shardings=(whole, jax.tree.map(lambda _: whole, trainable)))
        found = collectives(fn.lower(trainable, frozen, args).compile())
    trained = sum(x.nbytes for x in jax.tree.leaves(trainable)) + 4
    if method.name in LARGER:
        moved = sum(map(size, found.values()))
        assert trained < moved < trained + sum(x.nbytes for x in jax.tree.leaves(model.params))
    else:
        assert found.keys() == {"all-reduce"} and size(found["all-reduce"]) <= trained
