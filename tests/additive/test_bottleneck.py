"""Bottleneck adapters against the formula, written into the models by hand."""

import by_hand
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.testing import shaken, subject


PHI = {
    "gelu": lambda h: 0.5 * h * (1 + jnp.tanh((2 / jnp.pi) ** 0.5 * (h + 0.044715 * h**3))),
    "relu": lambda h: h * (h > 0).astype(h.dtype),
    "identity": lambda h: h,
}

# placement -> modules of a layer, activation, scale, whether it reads the module's input
PLACEMENTS = {
    "houlsby": (("attention/out", "mlp/down"), "gelu", 1, False),
    "pfeiffer": (("mlp/down",), "relu", 1, False),
    "parallel": (("mlp",), "relu", 4, True),
}


def adapter(node, h, phi, scale):
    """s (phi(h D + d) U + u)"""
    return scale * (PHI[phi](h @ node.down + node.down_bias[None, None]) @ node.up + node.up_bias[None, None])


def adapted(kind, **options):
    """A model, its parameters with adapters, all their arrays random, and the adapters by module."""
    model = subject(kind)
    trainable, frozen = jpeft.partition(jpeft.bottleneck(model.params, width=3, sites=model.sites, **options))
    return model, jpeft.combine(shaken(trainable, jax.random.key(8), 0.5), frozen)


def by_formula(model, params, phi, scale, parallel):
    """The model's output by hand."""
    nodes = by_hand.adapters(params)

    def around(path, x, y):
        return y + adapter(nodes[path], x if parallel else y, phi, scale) if path in nodes else y

    run = by_hand.encoder if "embeddings" in params else by_hand.decoder
    return run(model.model.config, params, *model.args, around)


def gradients(model, run, params):
    trainable, frozen = jpeft.partition(params)
    waves = lambda y: jnp.mean((y - jnp.cos(jnp.arange(y.size)).reshape(y.shape)) ** 2)
    return jax.jit(jax.grad(lambda t: waves(run(jpeft.combine(t, frozen)))))(trainable)


def close(found, want, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_placements(kind, placement):
    modules, phi, scale, parallel = PLACEMENTS[placement]
    model, params = adapted(kind, placement=placement)
    assert set(by_hand.adapters(params)) == {f"layers_{n}/{module}" for n in range(2) for module in modules}
    formula = lambda params: by_formula(model, params, phi, scale, parallel)
    want = jax.jit(formula)(params)
    assert np.abs(want - model.output).max() > 0.1
    close(model.run(params), want)
    close(gradients(model, model, params), gradients(model, formula, params), 1e-4)


@pytest.mark.parametrize("path", ["attention", "mlp", ""])
def test_any_module(path):
    """A whole block, or a whole layer."""
    model, params = adapted("decoder", targets=rf"layers_\d/{path}".rstrip("/"), activation="relu", scale=2.0)
    assert set(by_hand.adapters(params)) == {f"layers_{n}/{path}".rstrip("/") for n in range(2)}
    close(model.run(params), by_formula(model, params, "relu", 2, False))


def test_the_model_itself():
    model, params = adapted("encoder", targets="", activation="identity")
    close(model.run(params), model.output + adapter(params["bottleneck"], model.output, "identity", 1))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_up_of_zero_is_the_base(placement):
    """Bitwise, whatever the rest."""
    model, params = adapted("decoder", placement=placement)
    is_adapter = lambda x: isinstance(x, jpeft.Bottleneck)
    still = lambda x: x.replace(up=0 * x.up, up_bias=0 * x.up_bias) if is_adapter(x) else x
    np.testing.assert_array_equal(model.run(jax.tree.map(still, params, is_leaf=is_adapter)), model.output)


def test_identity_merges_into_the_projection():
    """W' = W (I + s D U), b' = b (I + s D U) + s (d U + u)."""
    model, params = adapted("encoder", activation="identity", scale=0.5)
    merged = model.params
    for path, node in by_hand.adapters(params).items():
        n, block, name = path.split("/")
        own = merged[n][block][name]
        turn = jnp.eye(16) + 0.5 * node.down @ node.up
        shift = 0.5 * (node.down_bias @ node.up + node.up_bias)
        own = {"kernel": own["kernel"] @ turn, "bias": own["bias"] @ turn + shift}
        merged = merged | {n: merged[n] | {block: merged[n][block] | {name: own}}}
    close(model.run(params), model.run(merged))


def test_parallel_identity_is_lora():
    """Of one projection, without biases: A = D, B = U."""
    model, params = adapted("decoder", placement="parallel", activation="identity", targets=".*/value", scale=3.0)
    tuned = jpeft.lora(model.params, rank=3, alpha=9, targets=".*/value/kernel")
    for n in range(2):
        own, other = (tree[f"layers_{n}"]["attention"]["value"] for tree in (params, tuned))
        node = own["bottleneck"] = own["bottleneck"].replace(down_bias=jnp.zeros(3), up_bias=jnp.zeros(8))
        other["kernel"] = other["kernel"].replace(a=node.down, b=node.up)
    close(model.run(params), model.run(tuned))


class Cell(nn.Module):
    """Returns a tuple."""

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(x.shape[-1], name="dense")(x)
        return y, {"state": jnp.tanh(y)}


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Cell(name="cell")(x)


def test_a_tuple_is_adapted_in_its_first_part():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    params = Network().init(jax.random.key(1), x)["params"]
    y, state = Network().apply({"params": params}, x)
    sites = jpeft.sites(Network(), {"params": params}, x)
    params = jpeft.bottleneck(params, width=2, targets="cell", sites=sites, init="houlsby", activation="relu")
    node = params["cell"]["bottleneck"] = shaken(params["cell"]["bottleneck"], jax.random.key(2))
    found, found_state = jpeft.apply(Network(), {"params": params}, x)
    close(found, y + adapter(node, y, "relu", 1))
    close(found_state, state)


def test_the_later_adapter_acts_around_the_earlier():
    model, params = adapted("decoder", targets="lm_head", activation="relu")
    again = jpeft.bottleneck(params, width=2, targets="lm_head", init="houlsby", activation="identity")
    first, second = again["lm_head"]["bottleneck"], shaken(again["lm_head"]["bottleneck_1"], jax.random.key(1))
    again["lm_head"]["bottleneck_1"] = second
    y = model.output + adapter(first, model.output, "relu", 1)
    close(model.run(again), y + adapter(second, y, "identity", 1))
