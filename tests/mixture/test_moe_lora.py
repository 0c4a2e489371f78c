"""Mixtures of LoRA experts against the formula, written by hand, and against single LoRAs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft._tree import map_nodes, nodes_of
from jpeft.models import Decoder, DecoderConfig
from jpeft.testing import shaken, subject


X = jax.random.normal(jax.random.key(1), (2, 5, 6))
DENSE = nn.Dense(4)
PARAMS = DENSE.init(jax.random.key(2), X)["params"]


def trained(params, size=0.5):
    """As after training: all that trains is random."""
    trainable, frozen = jpeft.partition(params)
    return jpeft.combine(shaken(trainable, jax.random.key(8), size), frozen)


def close(found, want, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


def of_dense(**options):
    return trained(jpeft.moe_lora(PARAMS, rank=2, experts=3, alpha=3, **options))


def by_formula(params, x, top):
    """y = x W + b + s sum_e g_e x A_e B_e, token by token."""
    node, rows = params["moe_lora"], []
    for row in x.reshape(-1, x.shape[-1]):
        scores = jnp.exp(row @ node.router)
        shares = scores / jnp.sum(scores)
        best = np.argsort(-np.asarray(jax.lax.stop_gradient(shares)))[:top]
        total = jnp.sum(shares[best]) if top > 1 else 1.0
        y = row @ params["kernel"] + params["bias"]
        for e in best:
            y = y + 1.5 * shares[e] / total * (row @ node.a[e] @ node.b[e])
        rows.append(y)
    return jnp.stack(rows).reshape(*x.shape[:-1], -1)


def test_the_router_sees_what_is_dropped():
    """Dropout is of what the experts see."""
    params = of_dense(dropout=0.5)
    _, usual = jpeft.load_balance(DENSE, {"params": params}, X)
    y, found = jpeft.load_balance(DENSE, {"params": params}, X, rngs=jax.random.key(0))
    assert found == usual and np.abs(y - jpeft.apply(DENSE, {"params": params}, X)).max() > 1e-2


@pytest.mark.parametrize("top", [None, 1, 2, 3])
def test_formula_and_gradients(top):
    params, trains = of_dense(top=top), ("router", "a", "b")
    node = params["moe_lora"]
    close(jpeft.apply(DENSE, {"params": params}, X), by_formula(params, X, top or 3))

    def slopes(run):
        waves = lambda y: jnp.mean((y - jnp.cos(jnp.arange(y.size)).reshape(y.shape)) ** 2)
        loss = lambda own, x: waves(run({**params, "moe_lora": node.replace(**own)}, x))
        return jax.grad(loss, (0, 1))({name: getattr(node, name) for name in trains}, X)

    found = slopes(lambda params, x: jpeft.apply(DENSE, {"params": params}, x))
    assert all(np.abs(g).max() > 1e-4 for g in jax.tree.leaves(found))
    close(found, slopes(lambda params, x: by_formula(params, x, top or 3)), 1e-4)


def test_a_certain_gate_is_the_member():
    params = of_dense()
    node = params["moe_lora"] = params["moe_lora"].replace(router=1e4 * params["moe_lora"].router)
    found, chosen = jpeft.apply(DENSE, {"params": params}, X), np.argmax(np.asarray(X @ node.router), -1)
    assert {*chosen.ravel().tolist()} == {0, 1, 2}
    tuned = jpeft.lora(PARAMS, rank=2, alpha=3)
    for e in range(3):
        tuned["kernel"] = tuned["kernel"].replace(a=node.a[e], b=node.b[e])
        member = jpeft.apply(DENSE, {"params": tuned}, X)
        close(found[chosen == e], member[chosen == e])


def as_lora(model, params, fold):
    """The tree with a LoRA for every mixture: `fold` makes its factors of those of the experts."""
    nodes = nodes_of(params, jpeft.MoELoRA)
    first = next(iter(nodes.values()))
    rank = fold(first.a, first.b, first.a.ndim - 3)[0].shape[-1]
    tuned = jpeft.lora(model.params, rank=rank, alpha=rank * first.scale, sites=model.sites)

    def walk(tree, path=""):
        for name, x in tree.items():
            if isinstance(x, jpeft.LoRA):
                node = nodes[f"{path}moe_lora"]
                a, b = fold(node.a, node.b, node.a.ndim - 3)
                tree[name] = x.replace(a=a, b=b)
            elif isinstance(x, dict):
                walk(x, f"{path}{name}/")
        return tree

    return walk(tuned)


def mean(a, b, depth):
    """Of all experts, as one of E times the rank."""
    wide = jnp.moveaxis(a, depth, -2).reshape(*a.shape[:depth], a.shape[-2], -1)
    return wide, b.reshape(*b.shape[:depth], -1, b.shape[-1]) / a.shape[depth]


def lone(a, b, depth):
    return jnp.squeeze(a, depth), jnp.squeeze(b, depth)


@pytest.mark.slow
@pytest.mark.parametrize(("scan", "base"), [(False, "int8"), (True, "nf4")])
def test_equal_gates_are_the_mean(scan, base):
    model = subject(scan=scan, base=base)
    params = trained(jpeft.moe_lora(model.params, rank=2, experts=3, alpha=3, sites=model.sites))
    even = lambda x: x.replace(router=jnp.zeros_like(x.router))
    params = map_nodes(even, params, jpeft.MoELoRA)
    found = model.run(params)
    assert np.abs(found - model.output).max() > 0.1
    close(found, model.run(as_lora(model, params, mean)), 1e-4)


@pytest.mark.parametrize("top", [None, 1])
@pytest.mark.parametrize(("kind", "scan"), [("decoder", True), ("encoder", False)])
def test_one_expert_is_lora(top, kind, scan):
    model = subject(kind, scan)
    params = trained(jpeft.moe_lora(model.params, rank=2, experts=1, top=top, alpha=3, sites=model.sites))
    close(model.run(params), model.run(as_lora(model, params, lone)), 1e-4)


def test_kernels_of_more_axes():
    """Flax's attention has queries of (features, heads, width), and an output of (heads, width, features)."""
    model, x = nn.MultiHeadDotProductAttention(2, qkv_features=8), X
    params = model.init(jax.random.key(0), x)["params"]
    sites = jpeft.sites(model, {"params": params}, x)
    tuned = trained(jpeft.moe_lora(params, rank=2, experts=1, sites=sites))
    plain = jpeft.lora(params, rank=2, sites=sites)
    for name, own in plain.items():
        node = tuned[name]["moe_lora"]
        own["kernel"] = own["kernel"].replace(a=node.a[0], b=node.b[0])
    found, want = (jpeft.apply(model, {"params": p}, x) for p in (tuned, plain))
    assert np.abs(found - model.apply({"params": params}, x)).max() > 0.1
    close(found, want)


def test_dropout_needs_a_key():
    params = of_dense(dropout=0.5)
    run = lambda **more: jpeft.apply(DENSE, {"params": params}, X, **more)
    close(run(), by_formula(params, X, 3))
    assert np.abs(run(rngs={"dropout": jax.random.key(0)}) - run()).max() > 0.1


def test_what_a_mixture_cannot_stand_beside():
    config = DecoderConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    model, ids = Decoder(config), jnp.zeros((1, 3), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    sites = jpeft.sites(model, {"params": params}, ids)
    with pytest.raises(ValueError, match=r"experts/down.*gate_up, too(.|\n)*experts/gate_up.*down, too"):
        jpeft.moe_lora(params, sites=sites)
    with pytest.raises(ValueError, match=r"embed/embedding.*used by gather"):
        jpeft.moe_lora(params, targets="embed/embedding", sites=sites)


@pytest.mark.parametrize("wrong", [{"top": 4}, {"top": 0}, {"experts": 0}, {"rank": 0}, {"alpha": 0}])
def test_options(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        jpeft.moe_lora(PARAMS, **{"experts": 3} | wrong)


def test_it_does_not_merge():
    with pytest.raises(ValueError, match="moe_lora: MoELoRA, which acts on activations"):
        jpeft.merge(of_dense())
