"""Prefixes that a network makes: those of PEFT, one network for all layers of a kind, and none once collapsed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_llama import check, close, llama, stored

import jpeft
from jpeft._shared import SHARED
from jpeft._tree import nodes_of
from jpeft.models import T5, T5Config
from jpeft.testing import shaken, subject


ENCODER = "prompt_encoder.default."


def by_layer(x):
    """PEFT's features, of all layers, with the layer first and what keys and values have of it last: (2, ..., 16)."""
    return jnp.moveaxis(x.reshape(*x.shape[:-1], 2, 16), -2, 0)


def of_layers(x):
    return jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:-1], 32)


def stacked(tree, kind, *fields, scan):
    nodes = [x for _, x in sorted(nodes_of(tree, kind).items())]
    return [getattr(nodes[0], f) if scan else jnp.stack([getattr(x, f) for x in nodes]) for f in fields]


def filled(params, kind, scan, **arrays):
    """The tree with the arrays, of all layers, in its nodes."""
    count = iter(range(2))
    new = lambda x: x.replace(**(arrays if scan else {k: a[n] for n in [next(count)] for k, a in arrays.items()}))
    return jpeft._tree.map_nodes(new, params, kind)


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_prefix_is_that_of_peft(scan, tmp_path):
    model, params, sites = llama(tmp_path, scan)
    rows = by_layer(stored("prefix")[f"{ENCODER}embedding.weight"]).reshape(2, 3, 2, 2, 4)
    tuned = jpeft.prefix(params, length=3, sites=sites)
    tuned = filled(tuned, jpeft.Prefix, scan, keys=rows[:, :, 0], values=rows[:, :, 1])

    def theirs(tree):
        both = jnp.stack(stacked(tree, jpeft.Prefix, "keys", "values", scan=scan), axis=2)
        return {f"{ENCODER}embedding.weight": of_layers(both.reshape(2, 3, 16))}

    check(model, tuned, "prefix", theirs)


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_network_is_that_of_peft(scan, tmp_path):
    """Its last layer has parts for each layer of the model; the others are shared, and their gradients sums."""
    model, params, sites = llama(tmp_path, scan)
    own = {name.removeprefix(ENCODER): x for name, x in stored("projected").items()}
    tuned = jpeft.prefix(params, length=3, width=5, sites=sites)
    up, up_bias = by_layer(own["transform.2.weight"].T), by_layer(own["transform.2.bias"])
    tuned = filled(tuned, jpeft.ProjectedPrefix, scan, up=up, up_bias=up_bias)
    shared = {"rows": own["embedding.weight"], "down_bias": own["transform.0.bias"]}
    shared["down"] = own["transform.0.weight"].T
    tuned[SHARED] = {f"prefix_{name}": tuned[SHARED][f"prefix_{name}"].replace(array=x) for name, x in shared.items()}

    def theirs(tree):
        up, up_bias = stacked(tree, jpeft.ProjectedPrefix, "up", "up_bias", scan=scan)
        first = {name: tree[SHARED][f"prefix_{name}"].array for name in shared}
        found = {
            "embedding.weight": first["rows"],
            "transform.0.weight": first["down"].T,
            "transform.0.bias": first["down_bias"],
            "transform.2.weight": of_layers(up).T,
            "transform.2.bias": of_layers(up_bias),
        }
        return {ENCODER + name: x for name, x in found.items()}

    check(model, tuned, "projected", theirs)


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_collapsed_is_a_plain_prefix(scan):
    """With the same outputs, and nothing left of the network."""
    model = subject("decoder", scan)
    tuned = shaken(jpeft.prefix(model.params, length=3, width=5, sites=model.sites), jax.random.key(1))
    plain = jpeft.collapse(tuned)
    assert jax.tree.structure(plain) == jax.tree.structure(jpeft.prefix(model.params, length=3, sites=model.sites))
    close(model.run(plain), model.run(tuned))
    assert np.abs(model.run(plain) - model.output).max() > 0.1


def test_collapsing_leaves_what_others_share():
    model = subject("decoder")
    chain = jpeft.chain(jpeft.vera(rank=2), jpeft.prefix(length=3, width=5, sites=model.sites))
    tuned = shaken(chain(model.params), jax.random.key(1))
    plain = jpeft.collapse(tuned)
    assert plain[SHARED].keys() == {"vera_a", "vera_b"}
    close(model.run(plain), model.run(tuned))


def test_zeros_begin_at_zero():
    model = subject("decoder")
    plain = jpeft.collapse(jpeft.prefix(model.params, length=3, width=5, init="zeros", sites=model.sites))
    (first, *others) = nodes_of(plain, jpeft.Prefix).values()
    assert not any(np.any(x.keys) or np.any(x.values) for x in (first, *others))


def t5():
    config = T5Config(
        vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=4, relative_attention_num_buckets=8
    )
    model, ids = T5(config), jnp.array([[3, 9, 1, 7, 5]])
    params = shaken(model.init(jax.random.key(0), ids, decoder_input_ids=ids[:, :3])["params"], jax.random.key(1))
    return model, params, jpeft.sites(model, {"params": params}, ids, decoder_input_ids=ids[:, :3])


def test_an_encoder_decoder_has_three_networks():
    """Of its own are those of the encoder, of the decoder, and between them, as in the authors' code."""
    _, params, sites = t5()
    tuned = jpeft.prefix(params, length=3, width=5, sites=sites)
    nodes = nodes_of(tuned, jpeft.ProjectedPrefix)
    kinds = {}
    for path, node in nodes.items():
        kinds.setdefault(node.rows.name, []).append(path.removesuffix("/kv/prefix"))
    assert sorted(kinds.values()) == [
        [f"{place.format(n)}" for n in range(2)]
        for place in ("decoder/layers_{}/attention", "decoder/layers_{}/cross_attention", "encoder/layers_{}/attention")
    ]
    rows = [tuned[SHARED][name].array for name in kinds]
    assert len(rows) == 3 and not np.allclose(rows[0], rows[1]) and not np.allclose(rows[1], rows[2])
