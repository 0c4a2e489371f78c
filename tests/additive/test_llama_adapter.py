"""Attention to a prompt through a gate: that of PEFT, a formula by hand, and nothing while the gate is closed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_llama import check, close, llama, stored

import jpeft
from jpeft._tree import map_nodes, nodes_of
from jpeft.models._attention import Attention
from jpeft.models._rotary import rotate
from jpeft.testing import shaken, subject


def stacked(tree, field, scan):
    """The field of all nodes, the layers first."""
    nodes = [x for _, x in sorted(nodes_of(tree, jpeft.LlamaAdapter).items())]
    return getattr(nodes[0], field) if scan else jnp.stack([getattr(x, field) for x in nodes])


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", ["adaption", "adaption_last"])
def test_is_that_of_peft(case, scan, tmp_path):
    """Behind padding on either side, in all layers and in the last."""
    model, params, sites = llama(tmp_path, scan)
    count = 2 if case == "adaption" else 1
    tuned = jpeft.llama_adapter(params, length=3, layers=count, sites=sites)
    names = [f"base_model.model.model.layers.{n}.self_attn.adaption_" for n in range(2 - count, 2)]
    own = stored(case)
    prompts, gates = (jnp.stack([own[name + end].squeeze(0) for name in names]) for end in ("prompt", "gate"))
    if scan:
        whole = lambda x: jnp.pad(x, [(2 - count, 0)] + [(0, 0)] * (x.ndim - 1), constant_values=7)
        tuned = map_nodes(lambda x: x.replace(prompt=whole(prompts), gate=whole(gates)), tuned, jpeft.LlamaAdapter)
    else:
        each = iter(zip(prompts, gates, strict=True))
        new = lambda x: x.replace(**dict(zip(("prompt", "gate"), next(each), strict=True)))
        tuned = map_nodes(new, tuned, jpeft.LlamaAdapter)

    def theirs(tree):
        found = {}
        for n, name in enumerate(names):
            at = n - count  # from the end: of stacked layers the others have an array, too
            found[name + "prompt"] = stacked(tree, "prompt", scan)[at][None]
            found[name + "gate"] = stacked(tree, "gate", scan)[at][None]
        return found

    check(model, tuned, case, theirs)


@pytest.mark.parametrize("fused", [False, True])
def test_is_its_formula(fused):
    """Of grouped keys with biases and norms; queries are rotated, the prompt is not."""
    norm = lambda name: nn.RMSNorm(name=name)
    module = Attention(4, 2, use_bias=not fused, out_bias=False, fused=fused, qk_norm=norm)
    keys = jax.random.split(jax.random.key(0), 4)
    x, angles = jax.random.normal(keys[0], (2, 5, 16)), jax.random.normal(keys[1], (1, 5, 1, 2))
    rotation, mask = (jnp.cos(angles), jnp.sin(angles)), jnp.tril(jnp.ones((1, 1, 5, 5), bool))
    params = shaken(module.init(keys[2], x, mask, rotation)["params"], keys[3])
    node = jpeft.LlamaAdapter(prompt=jax.random.normal(keys[3], (3, 16)), gate=jnp.array(0.7))
    found = jpeft.apply(module, {"params": params | {"llama_adapter": node}}, x, mask, rotation)

    def project(name, at, x):
        own = params["qkv" if fused else name]
        start, end = {"query": (0, 16), "key": (16, 24), "value": (24, 32)}[name] if fused else (0, 99)
        y = x @ own["kernel"][:, start:end] + (0 if fused else own["bias"][*[None] * (x.ndim - 1)])
        return y.reshape(*y.shape[:-1], -1, 4)

    def normed(name, x):
        scale = params[name]["scale"][*[None] * (x.ndim - 1)]
        return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * scale

    query = rotate(normed("query_norm", project("query", 0, x)), rotation)
    key, value = normed("key_norm", project("key", 0, node.prompt)), project("value", 0, node.prompt)
    key, value = (jnp.repeat(y, 2, axis=1) for y in (key, value))
    weights = jax.nn.softmax(jnp.einsum("bqhw,khw->bhqk", query, key) / 2)
    seen = jnp.einsum("bhqk,khw->bqhw", weights, value).reshape(2, 5, 16)
    close(found - module.apply({"params": params}, x, mask, rotation), 0.7 * seen @ params["out"]["kernel"])


@pytest.mark.slow
@pytest.mark.parametrize("base", ["float", "int8", "nf4"])
@pytest.mark.parametrize("scan", [False, True])
def test_a_closed_gate_is_the_model(base, scan):
    """Bit for bit, and its gate moves first."""
    model = subject("decoder", scan, base)
    tuned = jpeft.llama_adapter(model.params, length=3, sites=model.sites)
    np.testing.assert_array_equal(model.run(tuned), model.output)
    trainable, frozen = jpeft.partition(tuned)
    grads = model.slope(trainable, frozen)[1]
    assert np.all(stacked(grads, "gate", scan) != 0) and not np.any(stacked(grads, "prompt", scan))


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_its_projections_have_their_nodes(scan):
    """Keys, values and outputs of the prompt go through LoRA on a quantized kernel as those of the tokens do."""
    model = subject("decoder", scan)
    chain = jpeft.chain(jpeft.nf4(), jpeft.lora(rank=2), jpeft.llama_adapter(length=3))
    tuned = shaken_trainable(chain(model.params, sites=model.sites))
    adapters = nodes_of(tuned, jpeft.LlamaAdapter)
    plain = jpeft.merge(without(tuned))
    for path, node in adapters.items():
        plain = jpeft._tree.place(plain, {path.rpartition("/")[0]: node}, "llama_adapter")
    close(model.run(tuned), model.run(plain), 1e-4)


def shaken_trainable(params):
    trainable, frozen = jpeft.partition(params)
    return jpeft.combine(shaken(trainable, jax.random.key(1), 0.5), frozen)


def without(params):
    """The tree without what stands beside modules."""
    kept = {k: x for k, x in params.items() if not isinstance(x, jpeft.Additive)}
    return {k: without(x) if isinstance(x, dict) else x for k, x in kept.items()}


@pytest.mark.parametrize("order", [1, -1])
def test_its_softmax_is_over_its_own_prompt(order):
    """A prefix, or another such prompt, has its part beside it, and none in it: the changes add up."""
    module, x = Attention(2, 2, use_bias=True), jax.random.normal(jax.random.key(0), (2, 5, 16))
    params = shaken(module.init(jax.random.key(1), x)["params"], jax.random.key(2))
    sites = jpeft.sites(module, {"params": params}, x)
    one, two = (
        jpeft.LlamaAdapter(prompt=jax.random.normal(jax.random.key(n), (3, 16)), gate=jnp.ones(())) for n in (3, 4)
    )
    run = lambda params: jpeft.apply(module, {"params": params}, x)
    other = jpeft.prefix(params, length=2, sites=sites, key=jax.random.key(5))
    there = [("", two), ("", one)][::order]
    both = other
    for path, node in there:
        both = jpeft._tree.place(both, {path: node}, "llama_adapter")
    alone = sum(run(params | {"llama_adapter": node}) - run(params) for node in (one, two))
    close(run(both) - run(other), alone)


def test_other_layers_of_a_stack_keep_their_gates_closed():
    model = subject("decoder", True)
    tuned = jpeft.llama_adapter(model.params, length=3, layers=1, sites=model.sites)
    opened = shaken_trainable(tuned)
    trainable, frozen = jpeft.partition(opened)
    grads = model.slope(trainable, frozen)[1]
    assert np.any(stacked(grads, "prompt", True)[1]) and not np.any(stacked(grads, "prompt", True)[0])
    assert not np.any(stacked(grads, "gate", True)[0])


@pytest.mark.slow
def test_a_cache_has_the_tokens_alone():
    model = subject("decoder")
    tuned = shaken_trainable(jpeft.llama_adapter(model.params, length=3, sites=model.sites))
    ids = model.args[0]
    y, cache = jpeft.apply(model.model, {"params": tuned}, ids[:, :4], cache=model.model.init_cache(2, 6))
    z, _ = jpeft.apply(model.model, {"params": tuned}, ids[:, 4:], cache=cache)
    close(jnp.concatenate([y, z], axis=1), jpeft.apply(model.model, {"params": tuned}, ids))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length=0"),
        ({"layers": 0}, "layers=0"),
        ({"layers": 3}, "`layers` is 3, and there are fewer: {'layers_': 2}"),
        ({"layers": 1, "targets": "lm_head"}, "Which layer is 'lm_head' in?"),
        ({"sites": None}, "jpeft.sites"),
        ({"targets": ".*/attentions"}, "matches no module"),
    ],
)
def test_refuses(options, message):
    model = subject("decoder")
    with pytest.raises(ValueError, match=message):
        jpeft.llama_adapter(model.params, **{"sites": model.sites} | options)


def test_refuses_modules_without_context():
    model = subject("decoder")
    tuned = jpeft.llama_adapter(model.params, targets=".*/mlp", sites=model.sites)
    with pytest.raises(ValueError, match=r"an argument `context`.*\n?.*It has \(x"):
        model.run(tuned)
