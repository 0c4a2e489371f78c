"""AdapterFusion against its formula and AdapterHub's, and what it makes of its members."""

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.testing import shaken, subject


def close(found, want, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


def trained(params, seed, size=0.4):
    """As after training."""
    trainable, frozen = jpeft.partition(params)
    return jpeft.combine(shaken(trainable, jax.random.key(seed), size), frozen)


def members(model, *options, **every):
    """Trees with bottlenecks, one for each of `options`, all of their arrays random."""
    every = {"width": 3, "sites": model.sites} | every
    return [trained(jpeft.bottleneck(model.params, **every | o), n) for n, o in enumerate(options)]


def with_identity(params):
    """With V = I."""
    ones = lambda x: jnp.broadcast_to(jnp.eye(x.shape[-1]), x.shape)
    still = lambda x: x.replace(value=ones(x.value)) if is_fusion(x) else x
    return jax.tree.map(still, params, is_leaf=is_fusion)


def is_fusion(x):
    return isinstance(x, jpeft.Fusion)


def fusions(params):
    """The nodes, by the path of their module."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_fusion)
    return {"/".join(k.key for k in path[:-1]): x for path, x in leaves if is_fusion(x)}


def adapter(node, h, scale):
    """s (relu(h D + d) U + u)"""
    h = h @ node.down + node.down_bias[None, None]
    return scale * (jnp.maximum(h, 0) @ node.up + node.up_bias[None, None])


def fused(node, nodes, h, temperature, scale):
    """sum_i a_i z_i V with a = softmax_i((h Q + q) . (z_i K) / T), one adapter after the other."""
    terms = [adapter(one, h, scale) for one in nodes]
    query = h @ node.query + node.query_bias[None, None]
    a = jnp.stack([jnp.exp(jnp.sum(query * (z @ node.key), -1) / temperature) for z in terms])
    a = a / jnp.sum(a, axis=0, keepdims=True)
    return sum(a[n][..., None] * (z @ node.value) for n, z in enumerate(terms))


@pytest.mark.parametrize(
    ("kind", "placement", "temperature"), [("decoder", "pfeiffer", 1.0), ("encoder", "parallel", 3.0)]
)
def test_formula(kind, placement, temperature):
    """Of members of several widths."""
    model, scale = subject(kind), 4.0 if placement == "parallel" else 1.0
    trees = members(model, {"width": 2}, {"width": 5}, {}, placement=placement, activation="relu")
    params = trained(jpeft.fuse(trees, temperature=temperature, sites=model.sites), 7)
    alone = [by_hand.adapters(tree) for tree in trees]
    assert set(fusions(params)) == set(alone[0])

    def formula(params):
        nodes = fusions(params)

        def around(path, x, y):
            if path not in nodes:
                return y
            h = x if placement == "parallel" else y
            return y + fused(nodes[path], [a[path] for a in alone], h, temperature, scale)

        run = by_hand.encoder if kind == "encoder" else by_hand.decoder
        return run(model.model.config, params, *model.args, around)

    (y, grads), (want, slopes) = by_hand.results(model, params), by_hand.results(formula, params)
    assert np.abs(want - model.output).max() > 0.1
    close(y, want)
    close(grads, slopes, 1e-4)


def test_adapterhub():
    """Its `BertFusion`, whose keys have a bias, and which takes the residual last."""
    model, rng = subject("encoder"), np.random.default_rng(0)
    params = trained(jpeft.fuse(members(model, {}, {}, {}, placement="pfeiffer")), 7)
    node = fusions(params)["layers_0/mlp/down"]
    h, residual, key_bias = (rng.normal(size=s).astype(np.float32) for s in ((2, 5, 16), (2, 5, 16), (16,)))
    up = np.stack([member.node.change(jnp.asarray(h), None) for member in node.members], axis=2)  # its up_list
    query_layer = h @ np.asarray(node.query) + np.asarray(node.query_bias)
    key_layer, value_layer = up @ np.asarray(node.key) + key_bias, up @ np.asarray(node.value)
    scores = (query_layer[:, :, None] @ key_layer.swapaxes(-2, -1))[:, :, 0]
    probs = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    context_layer = (probs[:, :, None] @ value_layer)[:, :, 0] + residual
    close(residual + node.change(jnp.asarray(h), None), context_layer)


def test_one_member_is_itself():
    """a = 1, and with V = I nothing is left of the attention."""
    model = subject("decoder")
    (tree,) = members(model, {})
    params = trained(jpeft.fuse([tree]), 7)
    close(model.run(with_identity(params)), model.run(tree))
    close(model.run(jpeft.fuse([tree])), model.run(tree))


def test_members_that_agree():
    model = subject("encoder")
    (tree,) = members(model, {}, placement="parallel")
    close(model.run(with_identity(trained(jpeft.fuse([tree] * 3, sites=model.sites), 7))), model.run(tree))


def test_heat_makes_a_mean():
    model = subject("encoder")
    trees = members(model, {}, {}, targets="layers_1/mlp/down")
    (node,) = fusions(with_identity(trained(jpeft.fuse(trees, temperature=1e6), 7))).values()
    h = jax.random.normal(jax.random.key(0), (2, 5, 16))
    close(node.change(h, None), sum(m.node.change(h, None) for m in node.members) / 2, 1e-4)
    sharp = node.replace(temperature=1e-3).change(h, None)
    far = [np.abs(sharp - m.node.change(h, None)).max(-1) for m in node.members]
    assert np.mean(np.minimum(*far) < 1e-5) > 0.9  # one member for each token


def test_dropout_is_of_the_scores():
    """A member's own has ended."""
    model = subject("encoder")
    params = trained(jpeft.fuse(members(model, {}, {}, dropout=0.5), dropout=0.5), 7)
    node = fusions(params)["layers_0/mlp/down"]
    h = jax.random.normal(jax.random.key(0), (40, 1, 16))
    found = [node.change(h, jax.random.key(n)) for n in range(2)]
    assert np.abs(found[0] - found[1]).max() > 1e-3
    (lone,) = fusions(jpeft.fuse(members(model, {}, dropout=0.5, targets="layers_0/mlp/down"), dropout=0.5)).values()
    close(lone.change(h, jax.random.key(0)), lone.change(h, None))


def test_members_do_not_train():
    """Nothing of theirs is in the trainable tree; steps with weight decay leave them as they are."""
    model = subject("decoder", True)
    trees = [jpeft.norms(tree) for tree in members(model, {}, {})]
    params = jpeft.fuse(trees, sites=model.sites)
    trainable, frozen = jpeft.partition(params)
    norms = 2 * 2 * 16 + 16
    assert sum(x.size for x in jax.tree.leaves(trainable)) == 2 * 2 * (3 * 16**2 + 16) + norms
    tx = optax.adamw(1e-2, weight_decay=0.1)
    grads = jax.jit(jax.grad(lambda t: model.loss(jpeft.combine(t, frozen))))(trainable)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(grads, tx.init(trainable), trainable)
    after = jpeft.combine(optax.apply_updates(trainable, updates), frozen)
    for n, tree in enumerate(trees):
        for module in ("attention/out", "mlp/down"):
            block, name = module.split("/")
            kept = after["layers"][block][name]["fusion"].members[n].node
            assert isinstance(kept, jpeft.Bottleneck)
            jax.tree.map(np.testing.assert_array_equal, kept, tree["layers"][block][name]["bottleneck"])


def test_places_where_a_member_has_nothing():
    """Those are fused that are there."""
    model = subject("decoder")
    trees = members(model, {"placement": "houlsby"}, {"placement": "pfeiffer", "activation": "gelu"})
    found = fusions(with_identity(trained(jpeft.fuse(trees), 7)))
    assert {path: len(node.members) for path, node in found.items()} == {
        f"layers_{n}/{module}": count for n in range(2) for module, count in (("attention/out", 1), ("mlp/down", 2))
    }
    h = jax.random.normal(jax.random.key(0), (2, 5, 16))
    close(found["layers_0/attention/out"].change(h, None),
          trees[0]["layers_0"]["attention"]["out"]["bottleneck"].change(h, None))  # fmt: skip


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_other_adapters(scan):
    """Some share arrays, which every member has as its own; some are of a few positions; some are fused themselves."""
    model = subject("decoder", scan)
    targets = r"layers(_\d)?/mlp/down"
    make = lambda fn, seed, **o: trained(fn(model.params, targets=targets, sites=model.sites, **o), seed)
    fuse = lambda *trees: jpeft.fuse(trees, sites=model.sites)
    shared = [make(jpeft.compacter, n, terms=2, reduction=4) for n in range(2)]
    edits = make(jpeft.reft, 3, rank=2, positions="all")
    tree = fuse(*shared, edits, fuse(*shared))
    assert "jpeft_shared" not in tree
    for alone in (*shared, edits, make(jpeft.reft, 4, rank=2, positions="f1+l2")):
        close(model.run(with_identity(fuse(alone))), model.run(alone))
    same = with_identity(fuse(with_identity(fuse(shared[0], shared[0])), shared[0]))
    close(model.run(same), model.run(shared[0]))
    assert np.isfinite(model.run(tree)).all()


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_penalty(scan):
    """0.01 ||V - I||^2, of every layer."""
    model = subject("encoder", scan)
    start = jpeft.fuse(members(model, {}, {}, placement="pfeiffer"), sites=model.sites)
    close(jpeft.fusion_penalty(start), jnp.array(0.01 * 2 * 16 * 15 * 1e-12))
    trainable, frozen = jpeft.partition(trained(start, 7))
    run = lambda t: jpeft.fusion_penalty(jpeft.combine(t, frozen), weight=0.5)
    penalty, grads = jax.jit(jax.value_and_grad(run))(trainable)
    matrices = lambda tree: np.concatenate([np.reshape(x.value, (-1, 16, 16)) for x in fusions(tree).values()])
    away = matrices(trainable) - np.eye(16)
    close(penalty, 0.5 * np.sum(away**2))
    close(matrices(grads), away)
    with pytest.raises(ValueError, match="no Fusion node in this tree"):
        jpeft.fusion_penalty(model.params)


def test_start_is_the_authors():
    model = subject("encoder")
    node = fusions(jpeft.fuse(members(model, {}, {})))["layers_0/mlp/down"]
    np.testing.assert_array_equal(node.value, np.where(np.eye(16), np.float32(1), np.float32(1e-6)))
    for x in (node.query, node.key):
        assert x.shape == (16, 16) and 0.015 < np.std(x) < 0.025
    assert not node.query_bias.any() and node.query_bias.shape == (16,)


def test_faults_are_told_together():
    model = subject("decoder")
    first, second = members(model, {"placement": "pfeiffer"}, {"placement": "pfeiffer"})
    twice = jpeft.bottleneck(first, placement="pfeiffer")
    inner = {"kernel": second["lm_head"]["kernel"] + 1}
    other = jpeft.lora(second | {"lm_head": inner}, targets="layers_0/mlp/up/kernel", rank=2)
    side = jpeft.bottleneck(model.params, targets="layers_0/mlp/down", placement="parallel")
    with pytest.raises(ValueError) as error:
        jpeft.fuse([first, twice, other, side, model.params | {"more": jnp.ones(2)}])
    told = str(error.value).splitlines()
    assert [line.strip() for line in told[1:]] == [
        "tree 2: layers_0/mlp/up/kernel is not that of tree 0",
        "tree 2: lm_head/kernel is not that of tree 0",
        "tree 4: more is not that of tree 0",
        "tree 1: layers_0/mlp/down has 2 adapters",
        "tree 1: layers_1/mlp/down has 2 adapters",
        "tree 4: it has no adapter",
        "layers_0/mlp/down: adapters at its input and output",
    ]


def test_an_adapter_that_something_acts_around():
    """The fusion would come last."""
    model = subject("decoder")
    outer = jpeft.beft(members(model, {})[0], targets="layers_0/mlp/down")
    with pytest.raises(ValueError, match=r"tree 0: layers_0/mlp/down/beft_1 acts around an adapter\Z"):
        jpeft.fuse([outer])


def test_nodes_within_a_member_do_not_train():
    model = subject("decoder")
    gated = jpeft.unipelt(model.params, rank=2, length=2, prefix_width=3, width=3, sites=model.sites)
    gated = trained(gated, 1)
    params = jpeft.fuse([gated], sites=model.sites)
    close(model.run(with_identity(params)), model.run(gated), 2e-5)
    assert not any(jax.tree.leaves(node.members) for node in fusions(jpeft.partition(params)[0]).values())


def test_equal_bases_need_not_be_one():
    model = subject("decoder")
    first, second = members(model, {}, {})
    again = jax.tree.map(jnp.copy, second)
    close(model.run(jpeft.fuse([first, again])), model.run(jpeft.fuse([first, second])), 0)


@pytest.mark.parametrize(
    ("trees", "options"), [(0, {}), (1, {"temperature": 0.0}), (1, {"dropout": 1.0}), (1, {"dropout": -0.1})]
)
def test_numbers(trees, options):
    tree = members(subject("decoder"), {})
    with pytest.raises(ValueError, match="Fuse trees, at a temperature above 0, dropout in"):
        jpeft.fuse(tree[:trees], **options)
