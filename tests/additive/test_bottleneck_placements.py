"""Placements and scales of bottleneck adapters, against AdapterHub's wiring written out layer by layer."""

import functools

import by_hand
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import waves

import jpeft
from jpeft.models._attention import attend
from jpeft.models._rotary import rotate, rotation
from jpeft.testing import shaken, subject


PHI = {
    "swish": lambda h: h / (1 + jnp.exp(-h)),
    "relu": lambda h: h * (h > 0).astype(h.dtype),
    "gelu_exact": lambda h: 0.5 * h * (1 + jax.scipy.special.erf(h / 2**0.5)),
}

# AdapterHub's configurations: how an adapter is wired, and the options here that it comes to.
HUB = {
    "double_seq_bn": ({}, {"activation": "swish", "reduction": 16, "init": "bert"}),
    "seq_bn": ({"ln_before": True}, {"placement": "double_norm", "reduction": 16, "init": "bert"}),
    "par_bn": ({"parallel": True, "scale": 4}, {"placement": "parallel", "reduction": 2}),
    "scaled_par_bn": ({"parallel": True}, {"placement": "parallel", "reduction": 2, "scale": "learned"}),
}
BLOCK = {"placement": "block", "reduction": 16, "init": "bert"}
ADAPTER_PLUS = {
    "placement": "block", "reduction": 8, "activation": "gelu_exact", "scale": "channel", "stochastic_depth": 0.1,
    "init": "adapter_plus",
}  # fmt: skip


def output_of(node, hidden, residual, layer_norm, *, ln_before=False, parallel=False, scale=1):
    """AdapterHub's output of a sublayer that made `hidden` of `residual`; `layer_norm` is None in pre-norm models."""
    normed = layer_norm or (lambda x: x)
    if node is None:
        return normed(hidden + residual)

    def bottleneck(x):
        down = PHI[node.activation](x @ node.down + node.down_bias[None, None])
        y = scale * (down @ node.up + node.up_bias[None, None])
        return y if node.gain is None else y * jnp.broadcast_to(node.gain, y.shape)

    if parallel:
        return normed(hidden + bottleneck(residual) + residual)
    before = hidden  # `residual_before_ln`
    if ln_before:
        hidden = normed(hidden + residual)
    return normed(bottleneck(hidden) + before + residual)


def hub(config, params, ids, mask, wiring):
    """The encoder, or the decoder, which norms first."""
    post, nodes = "embeddings" in params, by_hand.adapters(params)
    seen = mask[:, None, None].astype(bool)
    if post:
        x, angles, epsilon = embedded(params["embeddings"], ids, config.layer_norm_eps), None, config.layer_norm_eps
    else:
        x, epsilon = params["embed"]["embedding"][ids], config.rms_norm_eps
        angles = rotation(jnp.arange(ids.shape[1])[None], config.rope_theta, config.width)
        seen = seen & jnp.tril(jnp.ones((1, 1, ids.shape[1], ids.shape[1]), bool))
    sublayers = {"attention": lambda own, x: attention(config, own, x, seen, angles), "mlp": mlp}
    for n in range(config.num_hidden_layers):
        inside = {path: x for path, x in nodes.items() if path.startswith(f"layers_{n}")}
        for name, sublayer in sublayers.items():
            own = params[f"layers_{n}"]
            norm = functools.partial(by_hand.norm, own[f"{name}_norm"], epsilon=epsilon)
            node = next((x for path, x in inside.items() if ("attention" in path) == (name == "attention")), None)
            x = output_of(node, sublayer(own[name], x if post else norm(x)), x, norm if post else None, **wiring)
    return x if post else by_hand.dense(params["lm_head"], by_hand.norm(params["norm"], x, epsilon))


def embedded(own, ids, epsilon):
    tables = (own["word"], ids), (own["position"], jnp.arange(ids.shape[1])[None]), (own["token_type"], 0 * ids)
    return by_hand.norm(own["norm"], sum(table["embedding"][rows] for table, rows in tables), epsilon)


def attention(config, own, x, mask, angles):
    q, k, v = (by_hand.dense(own[n], x).reshape(*x.shape[:2], -1, x.shape[2] // config.num_attention_heads)
               for n in ("query", "key", "value"))  # fmt: skip
    q, k = (q, k) if angles is None else (rotate(q, angles), rotate(k, angles))
    return by_hand.dense(own["out"], attend(q, k, v, mask).reshape(x.shape))


def mlp(own, x):
    up = by_hand.dense(own["up"], x)
    y = jax.nn.silu(by_hand.dense(own["gate"], x)) * up if "gate" in own else jax.nn.gelu(up, approximate=False)
    return by_hand.dense(own["down"], y)


def adapted(kind, options):
    """A model, its parameters with adapters, all their arrays random."""
    model = subject(kind)
    trainable, frozen = jpeft.partition(jpeft.bottleneck(model.params, sites=model.sites, **options))
    return model, jpeft.combine(shaken(trainable, jax.random.key(8), 0.5), frozen)


def close(found, want, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


@pytest.mark.parametrize(
    ("kind", "wiring", "options"),
    [
        *(("encoder", *HUB[name]) for name in HUB),
        ("decoder", *HUB["double_seq_bn"]),
        ("decoder", {"ln_before": True}, BLOCK),
        ("decoder", {"ln_before": True}, ADAPTER_PLUS),
    ],
    ids=[*HUB, "double_seq_bn, pre-norm", "seq_bn, pre-norm", "adapter_plus"],
)
def test_wiring_is_that_of_adapterhub(kind, wiring, options):
    """Outputs, and the gradients of every array."""
    model, params = adapted(kind, options)
    formula = lambda params: hub(model.model.config, params, *model.args, wiring)
    trainable, frozen = jpeft.partition(params)
    want = jax.jit(formula)(params)
    assert np.abs(want - model.output).max() > 0.1
    close(model.run(params), want)
    slope = lambda run: jax.jit(jax.grad(lambda t: waves(run(jpeft.combine(t, frozen)))))(trainable)
    close(slope(model), slope(formula), 1e-4)


def test_double_norm_is_of_post_norm_models():
    """In a pre-norm one, the norm of that name stands before the feed-forward block."""
    model = subject("decoder", scan=True)
    with pytest.raises(ValueError, match=r"no residual sum: layers/mlp_norm.*placement='block'"):
        jpeft.bottleneck(model.params, placement="double_norm", sites=model.sites)


def test_a_learned_scale_starts_at_one():
    model = subject("encoder")
    scaled = {scale: jpeft.bottleneck(model.params, placement="parallel", scale=scale, sites=model.sites)
              for scale in (1.0, "learned", "channel")}  # fmt: skip
    shapes = {scale: jax.tree.map(jnp.shape, p["layers_0"]["mlp"]["bottleneck"].gain) for scale, p in scaled.items()}
    assert shapes == {1.0: None, "learned": (), "channel": (16,)}
    is_adapter = lambda x: isinstance(x, jpeft.Bottleneck)
    trained = lambda p: jax.tree.map(lambda x: x.replace(up=x.up + 0.1) if is_adapter(x) else x, p, is_leaf=is_adapter)
    for scale in ("learned", "channel"):
        close(model.run(trained(scaled[scale])), model.run(trained(scaled[1.0])))


class Wide(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="dense")(x)


def test_stochastic_depth_is_of_whole_rows():
    """Every row of the batch has all of the adapter, and more the more often it has none."""
    x, model = jax.random.normal(jax.random.key(0), (600, 3, 8)), Wide()
    params = model.init(jax.random.key(1), x)["params"]
    params = jpeft.bottleneck(params, width=2, targets="dense", stochastic_depth=0.25, init="bert")
    params = shaken(params, jax.random.key(2), 0.5)
    run = lambda **how: jpeft.apply(model, {"params": params}, x, **how)
    plain = model.apply({"params": jpeft.strip(params)}, x)
    change = run() - plain
    found = run(rngs={"dropout": jax.random.key(3)}) - plain
    left_out = np.abs(found).max(axis=(1, 2)) < 1e-6
    np.testing.assert_allclose(left_out.mean(), 0.25, atol=0.06)
    np.testing.assert_allclose(found[~left_out], change[~left_out] / 0.75, atol=1e-5)
