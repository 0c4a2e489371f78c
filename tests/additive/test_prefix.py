"""Keys and values before those of the tokens: those of a text are the text; others, a gated sum of two attentions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft._node import cast
from jpeft.models import Decoder, DecoderConfig
from jpeft.models._attention import KeysAndValues, attend
from jpeft.testing import shaken, subject


TEXT = jnp.array([3, 9, 1, 7])
IDS = jax.random.randint(jax.random.key(1), (2, 6), 0, 32)
MASK = jnp.ones((2, 6), jnp.int32).at[1, :2].set(0)


def close(found, want, tolerance=1e-5):
    np.testing.assert_allclose(found, want, rtol=0, atol=tolerance * np.abs(want).max())


def front(x, value=None):
    """`x` with the text before it, or a value for each of its tokens."""
    before = TEXT if value is None else jnp.full(4, value, x.dtype)
    return jnp.concatenate([jnp.broadcast_to(before[None].astype(x.dtype), (len(x), 4)), x], axis=1)


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_prefix_of_a_text_is_the_text(scan):
    """Of grouped keys, rotated by position; with padding, and with positions of one's own."""
    model = subject("decoder", scan)
    tuned = jpeft.init_prefix(model.model, model.params, TEXT)
    run = jax.jit(lambda *args: jpeft.apply(model.model, {"params": tuned}, IDS, *args))
    plain = jax.jit(lambda *args: model.model.apply({"params": model.params}, front(IDS), *args)[:, 4:])
    close(run(MASK), plain(front(MASK, 1)))
    positions = jnp.array([[0, 1, 2, 4, 5, 7]])
    places = jnp.concatenate([jnp.arange(4)[None], positions + 4], axis=1)
    close(run(None, positions), plain(None, places))
    assert np.abs(run(MASK) - model.model.apply({"params": model.params}, IDS, MASK)).max() > 0.1


def test_the_keys_of_a_text_in_an_encoder():
    """Those that its layers computed: there is no cache to read them from."""
    model = subject("encoder")
    tuned = jpeft.init_prefix(model.model, model.params, TEXT)
    how = {"mutable": ["intermediates"], "capture_intermediates": True}
    _, state = model.model.apply({"params": model.params}, TEXT[None], **how)
    for n in range(2):
        for name in ("key", "value"):
            want = state["intermediates"][f"layers_{n}"]["attention"][name]["__call__"][0]
            close(getattr(tuned[f"layers_{n}"]["attention"]["kv"]["prefix"], f"{name}s"), want.reshape(4, 4, 4))


@pytest.mark.slow
def test_a_text_behind_a_prefix_on_a_quantized_base():
    """Its own keys are taken, and not those that stand before it already; of a model in bfloat16 in float32."""
    model = subject("decoder", True)
    params = jpeft.nf4(cast(model.params, jnp.bfloat16), sites=model.sites)
    first = jpeft.init_prefix(model.model, params, TEXT[:2])
    tuned = jpeft.init_prefix(model.model, first, TEXT[2:])
    nodes = tuned["layers"]["attention"]["kv"]
    assert [(x.keys.shape, x.keys.dtype) for x in nodes.values()] == [((2, 2, 2, 4), jnp.float32)] * 2
    both = jpeft.init_prefix(model.model, params, TEXT)["layers"]["attention"]["kv"]["prefix"]
    found = jnp.concatenate([x.keys for x in nodes.values()], axis=1)
    close(found, both.keys, 0.03)


def learned():
    """A decoder with a table of 12 positions."""
    config = DecoderConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, learned_positions=True, max_position_embeddings=12,
    )  # fmt: skip
    model = Decoder(config)
    return model, shaken(model.init(jax.random.key(0), IDS)["params"], jax.random.key(2))


@pytest.mark.slow
def test_learned_positions_move_up():
    model, params = learned()
    tuned = jpeft.init_prefix(model, params, TEXT)
    assert tuned["position"]["prefix_shift"].limit == 12 and "prefix_shift" not in tuned
    close(jpeft.apply(model, {"params": tuned}, IDS), model.apply({"params": params}, front(IDS))[:, 4:])
    long = jpeft.init_prefix(model, params, jnp.arange(7))
    with pytest.raises(ValueError, match="6 tokens and a prompt of 7 are 13 positions: the model has 12"):
        jpeft.apply(model, {"params": long}, IDS)


def test_segments_each_see_the_prefix():
    """As if each stood alone, behind the text."""
    model = subject("decoder")
    tuned = jpeft.init_prefix(model.model, model.params, TEXT)
    segments = jnp.array([[1, 1, 1, 2, 2, 2]])
    y = jpeft.apply(model.model, {"params": tuned}, IDS[:1], segment_ids=segments)
    alone = jnp.concatenate([IDS[:1, :3], IDS[:1, 3:]])
    want = model.model.apply({"params": model.params}, front(alone))[:, 4:]
    close(y.reshape(2, 3, -1), want)


@pytest.mark.parametrize("order", [1, -1])
def test_segments_behind_a_prompt_and_a_prefix(order):
    """Each goes on from the positions of both, whichever was put there first."""
    model = subject("decoder")
    steps = [jpeft.prompt(length=4), jpeft.prefix(length=3, sites=model.sites)]
    tuned = jpeft.chain(*steps[::order])(model.params)
    run = lambda ids, **given: jpeft.apply(model.model, {"params": tuned}, ids, **given)
    y = run(IDS[:1], segment_ids=jnp.array([[1, 1, 1, 2, 2, 2]]))
    close(y, jnp.concatenate([run(IDS[:1, :3]), run(IDS[:1, 3:])], axis=1))


@pytest.mark.parametrize("order", [1, -1])
def test_a_cache_behind_a_prompt_and_a_prefix(order):
    """Positions: the prefix has the first, the prompt the next, and then come the tokens; in either order."""
    model = subject("decoder")
    steps = [jpeft.prompt(length=4), jpeft.prefix(length=3, sites=model.sites)]
    tuned = jpeft.chain(*steps[::order])(model.params, key=None)
    run = lambda ids, **how: jpeft.apply(model.model, {"params": tuned}, ids, allow_unused=True, **how)
    y, cache = run(IDS[:, :4], cache=model.model.init_cache(2, 6))
    rest, cache = run(IDS[:, 4:], cache=cache)
    np.testing.assert_array_equal(cache.positions[0], 3 + np.arange(10))
    close(jnp.concatenate([y, rest], axis=1), run(IDS))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["decoder", "learned"])
def test_with_a_cache(kind):
    """A part of the tokens first, and then the others, one at a time: the cache has the tokens alone."""
    model, params = learned() if kind == "learned" else (subject(kind).model, subject(kind).params)
    tuned = jpeft.init_prefix(model, params, TEXT)
    run = jax.jit(lambda ids, mask, cache: jpeft.apply(model, {"params": tuned}, ids, mask, cache=cache))
    y, cache = run(IDS[:, :4], MASK[:, :4], model.init_cache(2, 6))
    found = [y]
    for n in (4, 5):
        y, cache = run(IDS[:, n : n + 1], MASK[:, n : n + 1], cache)
        found.append(y)
    close(jnp.concatenate(found, axis=1)[:, 2:], jpeft.apply(model, {"params": tuned}, IDS, MASK)[:, 2:])


@pytest.mark.parametrize("kind", ["bool", "float", "none"])
def test_a_gated_sum_of_two_attentions(kind):
    """He et al., https://arxiv.org/abs/2110.04366: (1 - g) of the attention to the tokens, g of that to the prefix."""
    keys = jax.random.split(jax.random.key(0), 5)
    query, key, value = (jax.random.normal(k, (2, 5, heads, 4)) for k, heads in zip(keys, (4, 2, 2), strict=False))
    prefix = jpeft.Prefix(keys=jax.random.normal(keys[3], (3, 2, 4)), values=jax.random.normal(keys[4], (3, 2, 4)))
    seen = jnp.tril(jnp.ones((5, 5), bool))[None, None]
    mask = {"bool": seen, "float": jnp.where(seen, 0.0, -1e30), "none": None}[kind]
    found = attend(query, *jpeft.apply(KeysAndValues(), {"params": {"prefix": prefix}}, key, value, mask))

    repeated = lambda x: jnp.repeat(x, 2, axis=-2)
    scores = jnp.einsum("bqhw,bkhw->bhqk", query, repeated(key)) / 2
    scores = scores if mask is None else jnp.where(seen, scores, -jnp.inf)
    others = jnp.einsum("bqhw,khw->bhqk", query, repeated(prefix.keys)) / 2
    gate = jnp.exp(others).sum(-1) / (jnp.exp(others).sum(-1) + jnp.exp(scores).sum(-1))
    tokens = jnp.einsum("bhqk,bkhw->bqhw", jax.nn.softmax(scores), repeated(value))
    trained = jnp.einsum("bhqk,khw->bqhw", jax.nn.softmax(others), repeated(prefix.values))
    gate = gate.swapaxes(1, 2)[..., None]
    close(found, (1 - gate) * tokens + gate * trained)


def test_zeros_are_not_the_identity():
    """Of keys of zero, too, the scores take a part of the softmax."""
    model = subject("encoder")
    tuned = jpeft.prefix(model.params, length=3, init="zeros", sites=model.sites)
    assert np.abs(model.run(tuned) - model.output).max() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length=0"),
        ({"init": "text"}, "init='text'"),
        ({"width": 0}, "width=0"),
        ({"sites": None}, "how many heads.*\n.*jpeft.sites"),
        ({"targets": ".*/attention"}, r"heads, width\), not for these: {'layers_0/attention': \(2, 6, 16\)"),
        ({"targets": ".*/kvs"}, "matches no module"),
    ],
)
def test_refuses(options, message):
    model = subject("decoder")
    with pytest.raises(ValueError, match=message):
        jpeft.prefix(model.params, **{"sites": model.sites} | options)


class Shared(nn.Module):
    """Layers that share their attention; with `stop`, an output that gradients do not come back from."""

    layers: int = 1
    stop: bool = False

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(32, 16)(ids)
        attention = nn.MultiHeadDotProductAttention(2)
        for _ in range(self.layers):
            x += attention(x, x)
        return (jax.lax.stop_gradient(x) if self.stop else x), jnp.argmax(x, axis=-1)


def test_keys_and_values_pass_once():
    """Outputs of integers have no part in it. Zeros, or a sum over layers, would be no keys of the text."""
    params = Shared().init(jax.random.key(0), TEXT[None])["params"]
    keys = jpeft.init_prefix(Shared(), params, TEXT)["MultiHeadDotProductAttention_0"]["kv"]["prefix"].keys
    own = params["MultiHeadDotProductAttention_0"]["key"]
    close(keys, jnp.einsum("td,dhw->thw", params["Embed_0"]["embedding"][TEXT], own["kernel"]) + own["bias"][None])
    for model in (Shared(layers=2), Shared(stop=True)):
        with pytest.raises(ValueError, match=r"pass once, and do not at \['MultiHeadDotProductAttention_0/kv/tap'\]"):
            jpeft.init_prefix(model, params, TEXT)


def test_no_text_behind_a_prompt():
    model = subject("decoder")
    with pytest.raises(ValueError, match="call `init_prefix` first"):
        jpeft.init_prefix(model.model, jpeft.prompt(model.params, length=2), TEXT)
