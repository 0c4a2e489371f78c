"""Methods in groups of layers: which nodes stand where, and that each group is what its methods make of it alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.models import Decoder, DecoderConfig, Encoder, EncoderConfig
from jpeft.testing import shaken, subject


SIZES = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
IDS = jnp.arange(6).reshape(1, 6)


def encoder(layers):
    model = Encoder(EncoderConfig(**SIZES, num_hidden_layers=layers, max_position_embeddings=10))
    params = shaken(jax.jit(model.init)(jax.random.key(0), IDS)["params"], jax.random.key(1))
    return model, params, jpeft.sites(model, {"params": params}, IDS)


def kinds(tree):
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, jpeft.Node))
    return {type(x).__name__ for x in leaves if isinstance(x, jpeft.Node)}


@pytest.mark.parametrize(
    ("count", "sizes"),
    [
        (4, (1, 1, 1, 1)),
        (5, (1, 1, 2, 1)),
        (6, (1, 2, 2, 1)),
        (12, (2, 4, 4, 2)),
        (24, (4, 8, 8, 4)),
        (32, (5, 11, 11, 5)),
    ],
)
def test_spindle(count, sizes):
    assert jpeft.spindle(count) == sizes


@pytest.mark.slow
def test_groups_of_the_paper():
    model, params, sites = encoder(6)
    tuned = jpeft.s4(params, rank=2, width=3, length=2, sites=sites)
    groups = [
        {"Bottleneck", "LoRA"},
        {"Bottleneck", "Prefix"},
        {"Bottleneck", "Prefix"},
        {"Bottleneck", "Prefix", "Free"},
        {"Bottleneck", "Prefix", "Free"},
        {"Prefix", "Free", "LoRA"},
    ]
    assert [kinds(tuned[f"layers_{n}"]) for n in range(6)] == groups
    assert kinds(tuned["embeddings"]) == {"Shift"}  # once, however many groups have a prefix
    others = {k: x for k, x in tuned["embeddings"].items() if k != "position"}
    assert others == {k: x for k, x in params["embeddings"].items() if k != "position"}
    found = jax.jit(lambda p: jpeft.apply(model, {"params": p}, IDS))(tuned)
    plain = jax.jit(lambda p: model.apply({"params": p}, IDS))(params)
    assert np.abs(found - plain).max() > 1e-3


def test_rules_and_sizes_of_ones_own():
    """The same as chaining the methods with targets of the layers."""
    _, params, sites = encoder(5)
    term, adapter = jpeft.lora(rank=2), jpeft.bottleneck(width=3)
    tuned = jpeft.s4(params, rules=[[term], [adapter], [term]], sizes=[1, 3, 1], sites=sites, key=jax.random.key(7))
    key = jax.random.split(jax.random.key(7), 2)
    want = jpeft.lora(params, rank=2, targets=r"layers_[04]/.*kernel", key=key[0])
    want = jpeft.bottleneck(want, width=3, targets=r"layers_[123]/(attention/out|mlp/down)", key=key[1])
    assert jax.tree.structure(tuned) == jax.tree.structure(want)
    assert all((x == y).all() for x, y in zip(jax.tree.leaves(tuned), jax.tree.leaves(want), strict=True))


def test_layers_from_the_end_and_shared_arrays():
    model, params, sites = encoder(4)
    tuned = jpeft.in_layers(params, method=jpeft.vera(rank=2), layers=[0, -1], sites=sites)
    assert [kinds(tuned[f"layers_{n}"]) for n in range(4)] == [{"VeRA"}, set(), set(), {"VeRA"}]
    assert kinds(tuned["jpeft_shared"]) | kinds(tuned["embeddings"]) == set()
    jpeft.apply(model, {"params": tuned}, IDS)


def test_biases_outside_stay():
    _, params, _ = encoder(4)
    tuned = jpeft.in_layers(params, method=jpeft.bitfit(), layers=[2])
    assert kinds(tuned["embeddings"]) == set() and kinds(tuned["layers_2"]) == {"Free"} and kinds(tuned) == {"Free"}


@pytest.mark.slow
def test_decoder_without_biases():
    model = Decoder(DecoderConfig(**SIZES, num_hidden_layers=4, num_key_value_heads=1))
    params = jax.jit(model.init)(jax.random.key(0), IDS)["params"]
    tuned = jpeft.s4(params, rank=2, width=3, length=2, sites=jpeft.sites(model, {"params": params}, IDS))
    assert kinds(tuned["layers_3"]) == {"Prefix", "BEFT", "LoRA"}
    assert kinds({k: x for k, x in tuned.items() if "layers" not in k}) == {"Shift"}
    found = jpeft.generate(model, tuned, IDS, max_new_tokens=3).tokens[0]
    text = IDS
    for token in found:
        logits = jpeft.apply(model, {"params": tuned}, text)
        assert jnp.argmax(logits[0, -1]) == token
        text = jnp.concatenate([text, token[None, None].astype(text.dtype)], axis=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": [1, 1, 1]}, r"4 rules share 4 layers: `sizes` \(1, 1, 1\)"),
        ({"sizes": [2, 2, 1, 1]}, "cannot be theirs"),
        ({"sizes": [2, 0, 1, 1]}, "cannot be theirs"),
        ({"rules": [[]], "sizes": [5]}, "1 rules share 4 layers"),
    ],
)
def test_refuses(options, message):
    _, params, sites = encoder(4)
    with pytest.raises(ValueError, match=message):
        jpeft.s4(params, sites=sites, **options)


@pytest.mark.parametrize("method", [jpeft.prompt(length=2), jpeft.invertible()])
def test_refuses_what_stands_outside_of_layers(method):
    with pytest.raises(ValueError, match="outside of all layers alone"):
        jpeft.in_layers(subject("decoder").params, method=method, layers=[0])


def test_refuses_layers_that_are_not_there_or_stacked():
    _, params, _ = encoder(4)
    for layers, message in (([4, -5], r"the layers \[4, -5\]"), ([], "`layers` is empty")):
        with pytest.raises(ValueError, match=message):
            jpeft.in_layers(params, method=jpeft.lora(rank=2), layers=layers)
    with pytest.raises(ValueError, match="at least four layers, not of 2"):
        jpeft.s4(subject("decoder").params)
    with pytest.raises(ValueError, match=r"(?s)\['layers'\] are stacked.*scan=False.*unfreeze\(layers="):
        jpeft.in_layers(subject("decoder", True).params, method=jpeft.lora(rank=2), layers=[0])
