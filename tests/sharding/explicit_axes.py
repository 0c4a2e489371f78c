"""Meshes whose axes are explicit, automatic, or both: `test_sharding.py` runs this in a process with eight devices."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from methods import METHODS
from test_pairs import NAMES as IN_WEIGHTS

import jpeft
from jpeft.testing import shaken


NAMES = ("data", "tensor")
BESIDE = {
    "bottleneck": jpeft.bottleneck(width=4, targets="up|down"),
    "parallel": jpeft.bottleneck(width=4, placement="parallel", targets="up"),
    "compacter": jpeft.compacter(reduction=4, targets="down"),
    "reft": jpeft.reft(rank=2, targets="down"),
}
ROWS = [method for method in METHODS if method.name in IN_WEIGHTS]
IN_WEIGHTS = {row.name: lambda params, sites, row=row: row.make(params, sites, jax.random.key(3)) for row in ROWS}
IN_WEIGHTS["lora on nf4"] = lambda params, sites: jpeft.lora(jpeft.nf4(params, block=8), rank=4)
TYPES = [(a, b) for a in (AxisType.Auto, AxisType.Explicit) for b in (AxisType.Auto, AxisType.Explicit)]
SPECS = {"up": {"kernel": P(None, "tensor")}, "down": {"kernel": P("tensor", None)}}


class Projection(nn.Module):
    """Its product says how the output is divided, as explicit axes ask for."""

    features: int
    over: P | None

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        return jnp.einsum("bti,io->bto", x, kernel, out_sharding=self.over)


class Model(nn.Module):
    between: P | None = None
    after: P | None = None

    @nn.compact
    def __call__(self, x):
        return Projection(16, self.after, name="down")(jnp.tanh(Projection(32, self.between, name="up")(x)))


X = jax.random.normal(jax.random.key(0), (8, 5, 16))
PARAMS = shaken(Model().init(jax.random.key(0), X)["params"], jax.random.key(1))
SITES = jpeft.sites(Model(), {"params": PARAMS}, X)


def slope(model):
    def loss(trainable, frozen, x):
        return jnp.sum(jnp.square(jpeft.apply(model, {"params": jpeft.combine(trainable, frozen)}, x)))

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("adapter_sharding", ["tensor", "inherit"])
@pytest.mark.parametrize("types", TYPES, ids=lambda types: "-".join(t.name for t in types))
@pytest.mark.parametrize("method", [*IN_WEIGHTS, *BESIDE])
def test_gradients_are_those_of_one_device(method, types, adapter_sharding):
    tuned = (IN_WEIGHTS | BESIDE)[method](PARAMS, sites=SITES)
    trainable, frozen = jpeft.partition(tuned)
    trainable = shaken(trainable, jax.random.key(2))
    expected = slope(Model())(trainable, frozen, X)

    mesh = jax.make_mesh((2, 4), NAMES, axis_types=types)
    data, tensor = (name if kind is AxisType.Explicit else None for name, kind in zip(NAMES, types, strict=True))
    given = {"between": P(data, None, tensor), "after": P(data, None, None)} if data or tensor else {}
    placed = jpeft.combine(trainable, frozen)
    to = jpeft.shardings(placed, SPECS, mesh=mesh, adapter_sharding=adapter_sharding)
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P("data")))
        found = slope(Model(**given))(*jpeft.partition(jpeft.shard(placed, to)), x)
    for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert np.abs(x - y).max() <= 2e-6 * max(np.abs(x).max(), 1e-3)


AXES = {"layers/.*kernel": "sio", "down/kernel": "io"}
KERNELS = {
    "layers": {"up": {"kernel": jax.random.normal(jax.random.key(0), (3, 64, 32))}},
    "down": {"kernel": jax.random.normal(jax.random.key(1), (32, 64))},
}
PLACES = {"layers": {"up": {"kernel": P(None, "data", "tensor")}}, "down": {"kernel": P("tensor", "data")}}
MAKE = {
    "lora": jpeft.lora(rank=4), "pissa": jpeft.pissa(rank=4), "olora": jpeft.olora(rank=4), "dora": jpeft.dora(rank=4),
    "vera": jpeft.vera(rank=4), "delta": jpeft.delta(), "int8": jpeft.int8(),
    "lora on nf4": jpeft.chain(jpeft.nf4(block=8, targets=AXES), jpeft.lora(rank=4, targets=AXES)),
}  # fmt: skip


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.parametrize("method", MAKE)
def test_initialised_on_a_mesh(method, kind, compiled):
    """The same numbers, decompositions among them, and of kernels divided along both axes."""
    make = MAKE[method] if method == "lora on nf4" else lambda params: MAKE[method](params, targets=AXES)
    mesh = jax.make_mesh((2, 4), NAMES, axis_types=(kind, kind))
    placed = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), KERNELS, PLACES)
    found = (jax.jit(make) if compiled else make)(placed)
    for x, y in zip(jax.tree.leaves(make(KERNELS)), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(np.float32(x), np.float32(y), atol=2e-6)
