"""`apply` and `intercept`: what they pass on, refuse, leave behind, and trace."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from constructs import LORA, close, normal, random
from linen_constructs import Block

import jpeft


X = normal(4, 6)
KEYS = {"dropout": jax.random.key(1)}


class Model(nn.Module):
    """With a state, randomness, and a second method."""

    def setup(self):
        self.up, self.norm, self.drop, self.out = nn.Dense(5), nn.BatchNorm(momentum=0.5), nn.Dropout(0.5), nn.Dense(3)

    def encode(self, x, *, train=False):
        return self.drop(self.norm(self.up(x), use_running_average=not train), deterministic=not train)

    def __call__(self, x, *, train=False):
        return self.out(jnp.tanh(self.encode(x, train=train)))


class Jitted(nn.Module):
    """A class under `nn.jit`, all of whose instances share one cache of traces."""

    @nn.jit
    @nn.compact
    def __call__(self, x):
        return Block(name="block")(x)[0]


class Shift(jpeft.Additive):
    by: jpeft.Trainable[jax.Array]

    def output(self, y, *args):
        return y[0] + self.by[None], *y[1:]


def adapted(model, method=LORA):
    """Random variables with nodes, and the same with the nodes merged."""
    variables = jax.eval_shape(model.init, jax.random.key(0), X)
    tuned = random(variables | {"params": jax.eval_shape(method, variables["params"])})
    tuned = {name: x if name == "params" else jax.tree.map(jnp.abs, x) for name, x in tuned.items()}  # variances
    return tuned, tuned | {"params": jpeft.merge(tuned["params"])}


@pytest.mark.parametrize("how", [
    {},
    {"train": True, "rngs": KEYS, "mutable": ["batch_stats"]},
    {"train": True, "rngs": KEYS["dropout"], "mutable": ["batch_stats", "intermediates"]},
    {"method": "encode", "allow_unused": True},
    {"method": Model.encode, "train": True, "rngs": KEYS, "mutable": "batch_stats", "allow_unused": True},
])  # fmt: skip
def test_both_doors_are_the_merged_model(how):
    model = Model()
    tuned, merged = adapted(model)
    unused = how.pop("allow_unused", False)
    want = model.apply(merged, X, **how)
    got = jpeft.apply(model, tuned, X, allow_unused=unused, **how)
    with jpeft.intercept(allow_unused=unused):
        intercepted = model.apply(tuned, X, **how)
    close([got, intercepted], [want, want], 1e-5)


def test_unused():
    tuned, _ = adapted(Model())
    with pytest.raises(jpeft.UnusedNodeError, match="out/kernel: LoRA"):
        jpeft.apply(Model(), tuned, X, method="encode")
    with pytest.raises(jpeft.UnusedNodeError, match="out/kernel: LoRA"), jpeft.intercept():
        Model().apply(tuned, X, method="encode")
    used = {"up/kernel": "branched", "out/kernel": "unused"}
    assert dict(jpeft.coverage(Model(), tuned, X, method="encode")) == used
    params = {"v": normal(6, 2), "w": normal(6, 3)}
    tuned = LORA(params, targets=["v", "w"])
    with pytest.raises(jpeft.UnusedNodeError, match="v: LoRA"):
        jpeft.apply(lambda params, x: x @ params["w"], tuned, X)
    y = jpeft.apply(lambda params, x: x @ params["w"], tuned, X, allow_unused=True)
    close(y, X @ params["w"], 1e-6)  # B is zero


@pytest.mark.parametrize("first", ["plain", "tuned"])
def test_jit_leaks_nothing(first):
    """Neither door finds what the other left in a cache: `nn.jit`'s, or that of the caller's own `jax.jit`."""
    cold = type("Cold", (Jitted,), {})  # with caches of its own
    model, step = cold(), jax.jit(cold().apply)
    tuned, merged = adapted(model)
    plain = tuned | {"params": jpeft.strip(tuned["params"])}
    want = {"plain": Jitted().apply(plain, X), "tuned": Jitted().apply(merged, X)}
    assert jnp.max(jnp.abs(want["plain"] - want["tuned"])) > 0.1

    def run(which):
        if which == "plain":
            return [model.apply(plain, X), step(plain, X)]
        got = [jpeft.apply(model, tuned, X)]
        with jpeft.intercept():
            return [*got, model.apply(tuned, X), step(tuned, X)]

    other = {"plain": "tuned", "tuned": "plain"}[first]
    for which in (first, other, first, other):
        for y in run(which):
            close(y, want[which], 1e-5)


def test_jit_hides_no_additive_node():
    model = type("Cold", (Jitted,), {})()
    plain = random(jax.eval_shape(model.init, jax.random.key(0), X))
    y = model.apply(plain, X)
    sites = jpeft.sites(model, plain, X)
    assert sites.modules["block"].features_out == 6  # seen, though the model has been traced before
    shift = jpeft.attach(
        plain["params"],
        lambda key, d_in, d_out: Shift(by=jnp.ones(d_out)),
        name="shift",
        targets=["block"],
        sites=sites,
    )
    for _ in range(2):
        close(jpeft.apply(model, {"params": shift}, X), y + 1, 1e-6)
        close(model.apply(plain, X), y, 0)


def test_swap_of_adapters_is_no_new_trace():
    tuned, _ = adapted(Model())
    traces = []

    @jax.jit
    def run(variables):
        traces.append(variables)
        return jpeft.apply(Model(), variables, X)

    trainable, frozen = jpeft.partition(tuned["params"])
    other = tuned | {"params": jpeft.combine(jax.tree.map(lambda x: 2 * x, trainable), frozen)}
    for variables in (tuned, other):
        close(run(variables), Model().apply(variables | {"params": jpeft.merge(variables["params"])}, X), 1e-5)
    assert len(traces) == 1
