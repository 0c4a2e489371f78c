"""Invertible adapters: NICE's coupling, and where it stands."""

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal, waves

import jpeft
from jpeft.models import Decoder, DecoderConfig
from jpeft.models._rotary import rotation
from jpeft.testing import shaken, subject


def node(features, **options):
    """A node with random arrays."""
    params = jpeft.invertible({"embed": {"embedding": normal(0, 5, features)}}, inverse=None, **options)
    shared = {name: x.array for name, x in shaken(params["jpeft_shared"], jax.random.key(1), 0.5).items()}
    half = lambda letter: {name.removeprefix(f"invertible_{letter}_"): x for name, x in shared.items()
                           if name.startswith(f"invertible_{letter}_")}  # fmt: skip
    return params["embed"]["invertible"].replace(f=half("f"), g=half("g"))


def subnet(own, x):
    """Two linear layers, with ReLU between."""
    return np.maximum(x @ own["down"] + own["down_bias"], 0) @ own["up"] + own["up_bias"]


def coupling(own, x, rev=False):
    """AdapterHub's `NICECouplingBlock`, of vectors."""
    split = x.shape[-1] // 2
    x1, x2 = x[:split], x[split:]
    if not rev:
        y1 = x1 + subnet(own.f, x2)
        return np.concatenate([y1, x2 + subnet(own.g, y1)])
    y2 = x2 - subnet(own.g, x1)
    return np.concatenate([x1 - subnet(own.f, y2), y2])


@pytest.mark.parametrize("features", [8, 9])
def test_coupling(features):
    own, x = node(features), normal(2, 3, features)
    for rev in (False, True):
        want = [coupling(own, row, rev) for row in np.asarray(x)]
        np.testing.assert_allclose(x + own.replace(inverse=rev).change(x, None), want, atol=1e-5)


@pytest.mark.parametrize("features", [8, 9])
def test_the_inverse_undoes_it_and_no_volume_changes(features):
    own, x = node(features, activation="gelu", reduction=1), normal(2, features)
    forth = lambda x: x + own.change(x, None)
    assert np.abs(forth(x) - x).max() > 0.3
    y = forth(x)
    np.testing.assert_allclose(y + own.replace(inverse=True).change(y, None), x, atol=1e-5)
    assert abs(np.linalg.slogdet(jax.jacobian(forth)(x))[1]) < 1e-5


def arrays_of(params):
    return {half: {name: params["jpeft_shared"][f"invertible_{half}_{name}"].array
                   for name in ("down", "down_bias", "up", "up_bias")} for half in "fg"}  # fmt: skip


def formula(params, x, rev=False):
    """The coupling of hidden states, written out once more."""
    own = arrays_of(params)

    def bent(half, x):
        x = x @ own[half]["down"] + own[half]["down_bias"][None, None]
        return (x * (x > 0).astype(x.dtype)) @ own[half]["up"] + own[half]["up_bias"][None, None]

    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    if rev:
        second = second - bent("g", first)
        return jnp.concatenate([first - bent("f", second), second], -1)
    first = first + bent("f", second)
    return jnp.concatenate([first, second + bent("g", first)], -1)


def adapted(params, **options):
    trainable, frozen = jpeft.partition(jpeft.invertible(params, **options))
    return jpeft.combine(shaken(trainable, jax.random.key(8), 0.5), frozen)


def close(found, want, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


def test_in_a_decoder():
    """Behind the embeddings and before the head; gradients of both uses add up."""
    model = subject("decoder")
    params, config = adapted(model.params), model.model.config

    def run(params):
        ids, mask = model.args
        seen = jnp.tril(jnp.ones((1, 1, ids.shape[1], ids.shape[1]), bool)) & mask[:, None, None].astype(bool)
        angles = rotation(jnp.arange(ids.shape[1])[None], config.rope_theta, config.width)
        x = formula(params, params["embed"]["embedding"][ids])
        x = by_hand.layers(config, params, x, seen, angles, lambda path, x, y: y)
        x = by_hand.norm(params["norm"], x, config.rms_norm_eps)
        return by_hand.dense(params["lm_head"], formula(params, x, rev=True))

    close(model.run(params), jax.jit(run)(params))
    trainable, frozen = jpeft.partition(params)
    slope = lambda run: jax.jit(jax.grad(lambda t: waves(run(jpeft.combine(t, frozen)))))(trainable)
    close(slope(model), slope(run), 1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_before_heads_tied_or_not(tied):
    """Where the layer adds zero, logits are the head's, of NICE^-1(norm(NICE(embeddings)))."""
    config = DecoderConfig(vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
                           num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied)  # fmt: skip
    model, ids = Decoder(config), jnp.arange(6)[None]
    params = shaken(model.init(jax.random.key(0), ids)["params"], jax.random.key(1))
    for block, last in (("attention", "out"), ("mlp", "down")):
        params["layers_0"][block][last]["kernel"] *= 0
    params = adapted(params)
    x = by_hand.norm(params["norm"], formula(params, params["embed"]["embedding"][ids]), config.rms_norm_eps)
    x = formula(params, x, rev=True)
    want = x @ (params["embed"]["embedding"].T if tied else params["lm_head"]["kernel"])
    close(jpeft.apply(model, {"params": params}, ids), want)
    loss = jpeft.apply(model, {"params": params}, ids, labels=ids)
    close(loss[:, 1:], -jnp.take_along_axis(jax.nn.log_softmax(want[:, :-1]), ids[:, 1:, None], -1)[..., 0])


def test_in_an_encoder():
    """The sum of three tables, normed, is what the embeddings are; without logits there is no inverse."""
    model = subject("encoder")
    params = adapted(model.params, inverse=None)
    (ids, mask), config, own = model.args, model.model.config, params["embeddings"]
    assert isinstance(own["invertible"], jpeft.Invertible)
    x = sum(own[name]["embedding"][rows] for name, rows in
            (("word", ids), ("position", jnp.arange(ids.shape[1])[None]), ("token_type", 0 * ids)))  # fmt: skip
    x = formula(params, by_hand.norm(own["norm"], x, config.layer_norm_eps))
    want = by_hand.layers(config, params, x, mask[:, None, None].astype(bool), None, lambda path, x, y: y)
    close(model.run(params), want)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("encoder", {}, "matches no module"),
        ("decoder", {"targets": "lm_.*"}, "0 features"),
        ("decoder", {"targets": ["embed", "norm"]}, r"`targets` matches \['embed', 'norm'\]"),
        ("decoder", {"inverse": "nrom"}, "'nrom' matches no module"),
        ("decoder", {"reduction": 9}, "none are left in half of them / 9"),
        ("decoder", {"init": "ones"}, "`init` is 'ones'"),
        ("decoder", {"activation": "gellu"}, "no activation 'gellu'"),
    ],
)
def test_refuses(kind, options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.invertible(subject(kind).params, **options)


def test_refuses_a_second_one():
    with pytest.raises(ValueError, match="has an invertible adapter"):
        jpeft.invertible(adapted(subject("decoder").params))
