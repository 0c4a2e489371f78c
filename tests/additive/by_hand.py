"""The reference models once more, as plain functions, with a place for an adapter at every module of a layer."""

import jax
import jax.numpy as jnp

import jpeft
from jpeft.models._attention import attend
from jpeft.models._rotary import rotate, rotation


def dense(params, x):
    y = x @ params["kernel"]
    return y + params["bias"][None, None] if "bias" in params else y


def norm(params, x, epsilon):
    if "bias" in params:
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    y = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + epsilon) * params["scale"][None, None]
    return y + params["bias"][None, None] if "bias" in params else y


def layer(config, params, x, mask, angles, around):
    """A layer; `around(path, x, y)` is what its module at `path` returns where it made `y` of `x`."""

    def attention(x):
        own = params["attention"]
        q, k, v = (
            dense(own[n], x).reshape(*x.shape[:2], -1, x.shape[2] // config.num_attention_heads)
            for n in ("query", "key", "value")
        )
        q, k = (q, k) if angles is None else (rotate(q, angles), rotate(k, angles))
        y = attend(q, k, v, mask).reshape(x.shape)
        return around("attention", x, around("attention/out", y, dense(own["out"], y)))

    def mlp(x):
        own = params["mlp"]
        up = dense(own["up"], x)
        y = jax.nn.silu(dense(own["gate"], x)) * up if "gate" in own else jax.nn.gelu(up, approximate=False)
        return around("mlp", x, around("mlp/down", y, dense(own["down"], y)))

    if angles is None:
        y = norm(params["attention_norm"], x + attention(x), config.layer_norm_eps)
        return around("", x, norm(params["mlp_norm"], y + mlp(y), config.layer_norm_eps))
    y = x + attention(norm(params["attention_norm"], x, config.rms_norm_eps))
    return around("", x, y + mlp(norm(params["mlp_norm"], y, config.rms_norm_eps)))


def layers(config, params, x, mask, angles, around):
    for n in range(config.num_hidden_layers):
        here = lambda path, x, y, at=f"layers_{n}": around(f"{at}/{path}".rstrip("/"), x, y)
        x = layer(config, params[f"layers_{n}"], x, mask, angles, here)
    return x


def encoder(config, params, ids, mask, around):
    own, places = params["embeddings"], jnp.arange(ids.shape[1])[None]
    x = (
        own["word"]["embedding"][ids]
        + own["position"]["embedding"][places]
        + own["token_type"]["embedding"][0][None, None]
    )
    x = norm(own["norm"], x, config.layer_norm_eps)
    return layers(config, params, x, mask[:, None, None].astype(bool), None, around)


def decoder(config, params, ids, mask, around):
    seen = jnp.tril(jnp.ones((1, 1, ids.shape[1], ids.shape[1]), bool)) & mask[:, None, None].astype(bool)
    angles = rotation(jnp.arange(ids.shape[1])[None], config.rope_theta, config.width)
    x = layers(config, params, params["embed"]["embedding"][ids], seen, angles, around)
    return dense(params["lm_head"], norm(params["norm"], x, config.rms_norm_eps))


def adapters(params):
    """The bottleneck adapters, by the path of their module."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: isinstance(x, jpeft.Bottleneck))
    return {"/".join(k.key for k in path[:-1]): x for path, x in leaves if isinstance(x, jpeft.Bottleneck)}


def results(run, params):
    """The output, and gradients of a loss."""
    trainable, frozen = jpeft.partition(params)

    def loss(trainable):
        y = run(jpeft.combine(trainable, frozen))
        return jnp.mean((y - jnp.cos(jnp.arange(y.size)).reshape(y.shape)) ** 2), y

    grads, y = jax.jit(jax.grad(loss, has_aux=True))(trainable)
    return y, grads
