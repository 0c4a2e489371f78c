"""Attention with a prefix beside a formula by hand: windows, padding, rotations, and the three attentions of a T5."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_llama import close

import jpeft
from jpeft._tree import nodes_of
from jpeft.models import T5, Decoder, DecoderConfig, T5Config
from jpeft.models._t5_layers import T5Stack
from jpeft.testing import shaken


KEYS = jax.random.split(jax.random.key(0), 8)
LENGTH = 3
IDS = jax.random.randint(KEYS[0], (2, 8), 1, 32)
CONFIG = DecoderConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, sliding_window=3,
)  # fmt: skip
LEFT = jnp.ones((2, 8), jnp.int32).at[0, :3].set(0)
RIGHT = jnp.ones((2, 8), jnp.int32).at[0, 5:].set(0)


def attention(params, node, x, context=None, mask=None, angles=None, scale=None):
    """Grouped heads of width 4, whose queries and keys turn by `angles` (seq, 2), beside the keys of a prefix."""
    context = x if context is None else context
    project = lambda name, x: (x @ params[name]["kernel"]).reshape(*x.shape[:2], -1, 4)
    query, key, value = project("query", x), project("key", context), project("value", context)
    if angles is not None:
        turn = jax.lax.complex(jnp.cos(angles), jnp.sin(angles))[None, :, None]
        turned = lambda y: jax.lax.complex(y[..., :2], y[..., 2:]) * turn
        query, key = (jnp.concatenate([jnp.real(z), jnp.imag(z)], -1) for z in map(turned, (query, key)))
    before = lambda p, y: jnp.concatenate([jnp.broadcast_to(p, (len(x), *p.shape)), y], axis=1)
    heads = lambda y: jnp.repeat(y, query.shape[2] // y.shape[2], axis=2)
    key, value = heads(before(node.keys, key)), heads(before(node.values, value))
    scores = jnp.einsum("bqhw,bkhw->bhqk", query, key) * (0.5 if scale is None else scale)
    seen = 0 if mask is None else jnp.pad(mask, [(0, 0)] * 3 + [(LENGTH, 0)])
    y = jnp.einsum("bhqk,bkhw->bqhw", jax.nn.softmax(scores + seen), value)
    return y.reshape(*x.shape[:2], -1) @ params["out"]["kernel"]


def hidden(seen):
    """What is added to scores."""
    return jnp.where(seen, 0.0, -1e30)


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["left", "right", "none"])
def test_a_window_never_hides_the_prefix(mask):
    """A token sees itself and two behind, and all of the prefix, which is not rotated; tokens are moved up."""
    mask = {"left": LEFT, "right": RIGHT, "none": None}[mask]
    model = Decoder(CONFIG)
    params = shaken(model.init(KEYS[1], IDS)["params"], KEYS[2], 0.3)
    sites = jpeft.sites(model, {"params": params}, IDS)
    tuned = jpeft.prefix(params, length=LENGTH, sites=sites, key=KEYS[3])
    (node,) = nodes_of(tuned, jpeft.Prefix).values()

    distance = jnp.arange(8)[:, None] - jnp.arange(8)[None]
    seen = jnp.broadcast_to(((distance >= 0) & (distance < 3))[None, None], (2, 1, 8, 8))
    seen = seen if mask is None else seen & (mask > 0)[:, None, None]
    angles = (LENGTH + jnp.arange(8.0))[:, None] * jnp.array([1.0, 10000**-0.5])[None]
    norm = lambda name, own, x: x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * own[name]["scale"][None, None]
    own = params["layers_0"]
    x = params["embed"]["embedding"][IDS]
    x = x + attention(own["attention"], node, norm("attention_norm", own, x), mask=hidden(seen), angles=angles)
    y = norm("mlp_norm", own, x)
    y = jax.nn.silu(y @ own["mlp"]["gate"]["kernel"]) * (y @ own["mlp"]["up"]["kernel"])
    x = norm("norm", params, x + y @ own["mlp"]["down"]["kernel"])
    close(jpeft.apply(model, {"params": tuned}, IDS, mask), x @ params["lm_head"]["kernel"])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_windows_and_padding_in_a_cache(scan, side):
    """The first six tokens, and then one after the other, as all at once."""
    mask = LEFT if side == "left" else jnp.roll(RIGHT, -2, axis=1).at[:, 6:].set(1)  # padding in between
    model = Decoder(dataclasses.replace(CONFIG, num_hidden_layers=2), scan=scan)
    params = shaken(model.init(KEYS[1], IDS)["params"], KEYS[2], 0.3)
    sites = jpeft.sites(model, {"params": params}, IDS)
    tuned = jpeft.prefix(params, length=LENGTH, width=5, sites=sites, key=KEYS[3])
    run = jax.jit(lambda ids, mask, cache: jpeft.apply(model, {"params": tuned}, ids, mask, cache=cache))
    y, cache = run(IDS[:, :6], mask[:, :6], model.init_cache(2, 8))
    found = [y]
    for n in (6, 7):
        y, cache = run(IDS[:, n : n + 1], mask[:, n : n + 1], cache)
        found.append(y)
    want = jpeft.apply(model, {"params": tuned}, IDS, mask)
    real = np.asarray(mask, bool)
    close(np.asarray(jnp.concatenate(found, axis=1))[real], np.asarray(want)[real])


def t5(scan=False):
    config = T5Config(
        vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4, relative_attention_num_buckets=8
    )
    model, given = T5(config, scan=scan), {"decoder_input_ids": IDS[:, :4]}
    params = shaken(model.init(KEYS[1], IDS, **given)["params"], KEYS[2], 0.3)
    return model, params, jpeft.sites(model, {"params": params}, IDS, **given)


PLACES = [
    "encoder/layers_0/attention/kv",
    "decoder/layers_0/attention/kv",
    "decoder/layers_0/cross_attention/kv",
]


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_each_attention_of_a_t5_has_its_own_prefix(place):
    """What its modules return, one beside the other. The prefix is at no distance, and so has no bias."""
    model, params, sites = t5()
    tuned = jpeft.prefix(params, length=LENGTH, targets=place, sites=sites, key=KEYS[3])
    (node,) = nodes_of(tuned, jpeft.Prefix).values()
    how = {"mutable": ["intermediates"], "capture_intermediates": True}
    y, state = jpeft.apply(model, {"params": tuned}, IDS, decoder_input_ids=IDS[:, :4], **how)
    assert np.abs(y - model.apply({"params": params}, IDS, decoder_input_ids=IDS[:, :4])).max() > 0.01

    stack, layer, name, _ = place.split("/")
    returned = lambda *path: jax.tree.reduce(lambda tree, k: tree[k], path, state["intermediates"])["__call__"][0]
    own = params[stack][layer][name]
    x, found = returned(stack, layer, f"{name}_norm"), returned(stack, layer, name)
    bias = jnp.moveaxis(returned(stack, "relative_attention_bias"), -1, 0)[None]
    context = None
    if place == PLACES[1]:
        bias += hidden(jnp.tril(jnp.ones((1, 1, 4, 4), bool)))
    elif place == PLACES[2]:
        bias, context = None, returned("encoder", "norm")
    close(found, attention(own, node, x, context, bias, scale=1.0))


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_all_of_a_t5_in_its_cache(scan):
    """By default all three have one: they are in every step, and no cache has them."""
    model, params, sites = t5(scan)
    tuned = jpeft.prefix(params, length=LENGTH, sites=sites, key=KEYS[3])
    assert len(nodes_of(tuned, jpeft.Prefix)) == 3
    run = lambda *args, **given: jpeft.apply(model, {"params": tuned}, *args, **given)
    y, cache = run(IDS, LEFT, decoder_input_ids=IDS[:, :2], cache=model.init_cache(2, 4))
    found = [y]
    for n in (2, 3):
        y, cache = run(decoder_input_ids=IDS[:, n : n + 1], cache=cache, allow_unused=True)  # the encoder's
        found.append(y)
    close(jnp.concatenate(found, axis=1), run(IDS, LEFT, decoder_input_ids=IDS[:, :4]))


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_prefix_of_a_text_in_a_t5(scan):
    """Between encoder and decoder there are no distances: another text behind it is the two texts, encoded apart."""
    model, params, _ = t5(scan)
    text = jnp.array([5, 2, 9])
    cross = "decoder/.*/cross_attention/kv"
    tuned = jpeft.init_prefix(model, params, text, decoder_input_ids=text[None], targets=cross)
    found = jpeft.apply(model, {"params": tuned}, IDS, decoder_input_ids=IDS[:, :4])

    table = params["shared"]["embedding"]
    stack = lambda name, *args: T5Stack(model.config, name == "decoder", scan).apply({"params": params[name]}, *args)
    source = jnp.concatenate([stack("encoder", table[ids]) for ids in (jnp.stack([text, text]), IDS)], axis=1)
    close(found, stack("decoder", table[IDS[:, :4]], None, source) / 4 @ table.T)
    everywhere = jpeft.init_prefix(model, params, text, decoder_input_ids=text[None])
    assert [x.keys.shape[-3] for x in nodes_of(everywhere, jpeft.Prefix).values()] == [3, 3, 3]
