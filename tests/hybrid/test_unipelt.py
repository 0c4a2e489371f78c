"""Gates by hand; at 1 and at 0 the parts are there or not; while decoding they are those of the prompt."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.models import T5, T5Config
from jpeft.testing import shaken, subject


SIZES = {"rank": 2, "length": 3, "width": 4, "prefix_width": None}


def close(found, want, tolerance=2e-5):
    np.testing.assert_allclose(found, want, rtol=0, atol=tolerance * np.abs(want).max())


def made(model, **options):
    tuned = jpeft.unipelt(model.params, sites=model.sites, **SIZES | options)
    trainable, frozen = jpeft.partition(tuned)
    return jpeft.combine(shaken(trainable, jax.random.key(1), 0.5), frozen)


def gated(params, bias):
    """The tree with all gates at sigma(bias)."""
    gates = jpeft.Gated | jpeft.PrefixGate
    settle = lambda x: x.replace(gate=jnp.zeros_like(x.gate), gate_bias=jnp.full_like(x.gate_bias, bias))
    one = lambda x: settle(x) if isinstance(x, gates) else x
    return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, gates))


class Net(nn.Module):
    """A dense layer."""

    @nn.compact
    def __call__(self, x, attention_mask=None):
        return nn.Dense(5, name="dense")(x)


@pytest.mark.parametrize(("over_padding", "with_gate_mask"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("at", ["input", "output"])
def test_gate_by_hand(over_padding, with_gate_mask, at):
    """One number for an example: the mean over its tokens of a sigmoid."""
    keys = jax.random.split(jax.random.key(0), 6)
    x = jax.random.normal(keys[0], (2, 4, 3))
    mask, other = jnp.array([[1, 1, 1, 0], [0, 1, 1, 1]]), jnp.array([[1, 0, 0, 0], [0, 0, 1, 0]])
    size = 3 if at == "input" else 5
    normal = lambda n, *shape: jax.random.normal(keys[n], shape)
    inner = jpeft.LowRankTerm(a=normal(1, size, 2), b=normal(2, 2, 5), at=at)
    node = jpeft.Gated(inner=inner, at=at, gate=normal(3, size), gate_bias=jnp.array(0.3))
    own = {"kernel": normal(4, 3, 5), "bias": normal(5, 5)}
    params = {"gates": jpeft.Gates(count=1, over_padding=over_padding), "dense": own | {"gated": node}}
    more = {"gate_mask": other} if with_gate_mask else {}
    found = jpeft.apply(Net(), {"params": params}, x, mask, **more)

    x, node, own = jax.tree.map(np.asarray, (x, node, own))
    y = x @ own["kernel"] + own["bias"]
    h = x if at == "input" else y
    each = 1 / (1 + np.exp(-(h @ node.gate + 0.3)))
    weights = np.asarray(other) if with_gate_mask else np.ones((2, 4)) if over_padding else np.asarray(mask)
    gate = (each * weights).sum(1) / weights.sum(1)
    close(found, y + gate[:, None, None] * (h @ node.inner.a @ node.inner.b))


@pytest.mark.parametrize("over_padding", [False, True])
def test_prefix_gate_by_hand(over_padding):
    """Keys and values of the prefix are multiplied alike, by the mean over what goes into the attention."""
    model = subject("encoder")
    ids, mask = model.args
    tuned = gated(made(model, over_padding=over_padding), -1e3)  # but for the first layer's prefix
    gate = tuned["layers_0"]["attention"]["prefix_gate"]
    gate = gate.replace(gate=jnp.cos(jnp.arange(16.0)), gate_bias=jnp.array(0.4))
    tuned["layers_0"]["attention"]["prefix_gate"] = gate
    found = model.run(tuned)

    places = 3 + jnp.arange(6)[None]
    how = {"position_ids": places, "capture_intermediates": True}
    _, kept = model.model.apply({"params": model.params}, ids, mask, **how)
    h = kept["intermediates"]["embeddings"]["__call__"][0]
    each = 1 / (1 + np.exp(-(np.asarray(h) @ np.asarray(gate.gate) + 0.4)))
    weights = np.ones((2, 6)) if over_padding else np.asarray(mask)
    numbers = (each * weights).sum(1) / weights.sum(1)
    assert (abs(numbers[1] - each[1].mean()) < 1e-3) == over_padding  # the row with padding tells the two means apart
    plain = jpeft.prefix(model.params, length=3, init="zeros", sites=model.sites)
    for row, number in enumerate(numbers):
        trained = tuned["layers_0"]["attention"]["kv"]["prefix"]
        of_row = jpeft.Prefix(keys=number * trained.keys, values=number * trained.values)
        plain["layers_0"]["attention"]["kv"]["prefix"] = of_row
        close(found[row, : mask[row].sum()], model.run(plain)[row, : mask[row].sum()])


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_open_gates_are_the_parts(kind):
    model = subject(kind)
    tuned = gated(made(model), 1e3)
    parts = jpeft.chain(
        jpeft.lora(rank=2, targets=".*/(query|value)/kernel"),
        jpeft.prefix(length=3),
        jpeft.bottleneck(placement="pfeiffer", width=4),
    )(model.params, sites=model.sites)
    for n in range(2):
        ours, theirs = tuned[f"layers_{n}"], parts[f"layers_{n}"]
        for name in ("query", "value"):
            term, own = ours["attention"][name]["low_rank_term"].inner, theirs["attention"][name]
            own["kernel"] = own["kernel"].replace(a=term.a, b=term.b)
        theirs["attention"]["kv"]["prefix"] = ours["attention"]["kv"]["prefix"]
        theirs["mlp"]["down"]["bottleneck"] = ours["mlp"]["down"]["bottleneck"].inner
    close(model.run(tuned), model.run(parts))


def test_closed_gates_leave_keys_of_zero():
    model = subject("decoder")
    zeros = jpeft.prefix(model.params, length=3, init="zeros", sites=model.sites)
    close(model.run(gated(made(model), -1e3)), model.run(zeros))


def test_start():
    """LoRA and the adapter add nothing, and the gates are near one half."""
    model = subject("encoder")
    tuned = jpeft.unipelt(model.params, sites=model.sites, **SIZES)
    node = tuned["layers_0"]["attention"]["query"]["low_rank_term"]
    assert not np.any(node.inner.b) and not node.gate_bias and 0 < np.abs(node.gate).max() < 0.1
    assert sorted(x.slot for x in jax.tree.leaves(tuned["layers_0"], is_leaf=lambda x: isinstance(x, jpeft.Node))
                  if isinstance(x, jpeft.Gated | jpeft.PrefixGate)) == [0, 1, 2, 3]  # fmt: skip


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_decoding_keeps_the_gates_of_the_prompt(scan):
    """In pieces, with padding on the left, and one row without a token in the first piece."""
    model = subject("decoder", scan)
    tuned, ids = made(model), jax.random.randint(jax.random.key(5), (3, 8), 0, 32)
    mask = jnp.ones((3, 8), jnp.int32).at[1, :2].set(0).at[2, :4].set(0)
    prompt = jnp.zeros((3, 8), jnp.int32).at[0, :4].set(1).at[1, 2:4].set(1).at[2, 4:6].set(1)
    run = jax.jit(lambda ids, mask, cache: jpeft.apply(model.model, {"params": tuned}, ids, mask, cache=cache))
    cache, found = model.model.init_cache(3, 8), []
    for piece in (slice(0, 4), slice(4, 6), slice(6, 7), slice(7, 8)):
        y, cache = run(ids[:, piece], mask[:, piece], cache)
        found.append(y)
    whole = jax.jit(lambda gates: jpeft.apply(model.model, {"params": tuned}, ids, mask, gate_mask=gates))
    found, want = jnp.concatenate(found, axis=1), whole(prompt)
    close(found[:, 4:], want[:, 4:])
    close(found[:2, 2:], want[:2, 2:])
    assert np.abs(whole(mask) - want)[:, 4:].max() > 1e-2  # gates of all tokens are others


def test_generation_is_that_of_the_prompts_gates():
    model = subject("decoder")
    tuned, ids = made(model), jnp.array([[3, 1, 4, 1, 5], [0, 0, 9, 2, 6]])
    mask = jnp.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    found = jpeft.generate(model.model, tuned, ids, mask, max_new_tokens=4).tokens
    logits = jax.jit(lambda ids, mask, gates: jpeft.apply(model.model, {"params": tuned}, ids, mask, gate_mask=gates))
    for row, new in enumerate(np.asarray(found)):
        own = ids[row][mask[row] > 0]
        text = jnp.zeros((1, 9), jnp.int32).at[0, : len(own)].set(own)
        gates = (jnp.arange(9)[None] < len(own) - 1).astype(jnp.int32)  # its last token is read later
        for n, token in enumerate(new):
            at = len(own) + n
            seen = (jnp.arange(9)[None] < at).astype(jnp.int32)
            assert token == jnp.argmax(logits(text, seen, gates)[0, at - 1])
            text = text.at[0, at].set(token)


def test_refuses():
    model = subject("decoder")
    with pytest.raises(ValueError, match="Let the model tell"):
        jpeft.unipelt(model.params)
    with pytest.raises(ValueError, match="rank=0"):
        jpeft.unipelt(model.params, rank=0, sites=model.sites)
    with pytest.raises(ValueError, match="has gates"):
        jpeft.unipelt(made(model), sites=model.sites)
    with pytest.raises(ValueError, match=re.escape("(2, 1, 6, 6): give `gate_mask`")):
        jpeft.apply(model.model, {"params": made(model)}, model.args[0], jnp.ones((2, 1, 6, 6)))


def test_refuses_two_stacks():
    config = T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    ids = jnp.ones((1, 3), jnp.int32)
    params = T5(config).init(jax.random.key(0), ids, None, ids)["params"]
    sites = jpeft.sites(T5(config), {"params": params}, ids, None, ids)
    with pytest.raises(ValueError, match="an encoder and a decoder"):
        jpeft.apply(T5(config), {"params": jpeft.unipelt(params, sites=sites, **SIZES)}, ids, None, ids)


@pytest.mark.parametrize("first", ["unipelt", "llama_adapter"])
def test_gates_of_a_second_attention_are_those_of_the_first(first):
    """LLaMA-Adapter calls the attention again, on its prompt: in a cache the gates stay those of the tokens."""
    model = subject("decoder")
    make = {
        "unipelt": jpeft.unipelt(length=2, prefix_width=None, width=3, rank=2, sites=model.sites),
        "llama_adapter": jpeft.llama_adapter(length=3, sites=model.sites),
    }
    second = next(name for name in make if name != first)
    trainable, frozen = jpeft.partition(make[second](make[first](model.params)))
    params = jpeft.combine(shaken(trainable, jax.random.key(1), 0.5), frozen)
    ids = model.args[0]
    run = lambda *args, **how: jpeft.apply(model.model, {"params": params}, *args, **how)
    seen = jnp.ones_like(ids).at[:, 4:].set(0)
    whole = run(ids, gate_mask=seen)
    _, cache = run(ids[:, :4], cache=model.model.init_cache(2, 6))
    later, _ = run(ids[:, 4:], cache=cache)
    np.testing.assert_allclose(later, whole[:, 4:], atol=2e-5)
