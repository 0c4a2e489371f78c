"""The side network by hand; what the backward pass keeps and computes; caches."""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.models import T5, Classifier, Decoder, DecoderConfig, EncoderConfig, T5Config, stack_layers
from jpeft.testing import shaken, subject


sys.path.append(str(Path(__file__).parents[1] / "additive"))
import by_hand


def close(found, want, tolerance=2e-5):
    np.testing.assert_allclose(found, want, rtol=0, atol=tolerance * np.abs(want).max())


def made(model, params=None, reduction=2, **options):
    tuned = jpeft.ladder(model.params if params is None else params, model=model.model, reduction=reduction, **options)
    trainable, frozen = jpeft.partition(tuned)
    return jpeft.combine(shaken(trainable, jax.random.key(1)), frozen)


def with_gates(params, alpha):
    is_rung = lambda x: isinstance(x, jpeft.Rung)
    one = lambda x: x.replace(gate=jnp.full_like(x.gate, alpha)) if is_rung(x) else x
    return jax.tree.map(one, params, is_leaf=is_rung)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_by_hand(kind):
    model = subject(kind)
    tuned, (ids, mask) = made(model), model.args
    node, config = tuned["ladder"], model.model.config
    narrow = type(config)(**{**vars(config), "hidden_size": 8, "intermediate_size": 16})
    taps = []

    def note(path, x, y):
        taps.extend([y] if re.fullmatch(r"layers_\d", path) else [])
        return y

    getattr(by_hand, kind)(config, model.params, ids, mask, note)
    fed = lambda part, x: x @ part.down + part.down_bias[None, None]

    def side(h, n):
        rung = node.side[f"layers_{n}"]["rung"]
        mu = jax.nn.sigmoid(rung.gate / 0.1)
        return mu * h + (1 - mu) * fed(rung, taps[n])

    seen = mask[:, None, None].astype(bool)
    place = jnp.arange(6)[None]
    if kind == "decoder":
        seen &= jnp.tril(jnp.ones((1, 1, 6, 6), bool))
        angles = by_hand.rotation(place, config.rope_theta, 2)
        h = fed(node.side["embed"]["start"], model.params["embed"]["embedding"][ids])
    else:
        own, angles = node.side["embeddings"], None
        h = fed(own["word"]["start"], model.params["embeddings"]["word"]["embedding"][ids])
        h += own["position"]["embedding"][place] + own["token_type"]["embedding"][0][None, None]
        h = by_hand.norm(own["norm"], h, config.layer_norm_eps)
    for n in range(2):
        h = by_hand.layer(narrow, node.side[f"layers_{n}"], side(h, n), seen, angles, lambda path, x, y: y)
    if kind == "decoder":
        h = by_hand.norm(node.side["norm"], h, config.rms_norm_eps)
    z = h @ node.up + node.up_bias[None, None]
    want = by_hand.dense(model.params["lm_head"], z) if kind == "decoder" else z
    close(model.run(tuned)[mask > 0], want[mask > 0], 1e-4)


def test_open_gates_ignore_the_model():
    """But for its embeddings and its head; with closed ones a side block sees the model alone."""
    model = subject("decoder")
    tuned = made(model)
    noisy = lambda params, *names: params | {n: shaken(params[n], jax.random.key(3), 1.0) for n in names}
    layers = ("layers_0", "layers_1", "norm")
    for alpha, same in ((10.0, True), (-10.0, False)):
        params = with_gates(tuned, alpha)
        assert np.allclose(model.run(params), model.run(noisy(params, *layers)), atol=1e-6) == same
    assert not np.allclose(model.run(params), model.run(noisy(params, "layers_1")), atol=1e-2)
    first = params["ladder"].side["layers_0"]
    cut = params["ladder"].replace(side=params["ladder"].side | {"layers_0": jax.tree.map(lambda x: 2 * x, first)})
    close(model.run(params), model.run(params | {"ladder": cut}))
    close(model.run(tuned), model.run(noisy(tuned, "norm")))


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_scanned_is_unrolled(kind):
    model, scanned = subject(kind), subject(kind, True)
    tuned = made(model)
    node = tuned.pop("ladder")
    stacked = stack_layers(tuned) | {"ladder": node.replace(side=stack_layers(node.side))}
    close(scanned.run(stacked), model.run(tuned | {"ladder": node}))


def test_no_gradient_goes_to_the_model():
    model = subject("decoder")
    trainable, frozen = jpeft.partition(made(model))
    slope = jax.jit(jax.grad(lambda frozen: model.loss(jpeft.combine(trainable, frozen))))(frozen)
    moved = {jax.tree_util.keystr(path) for path, x in jax.tree_util.tree_leaves_with_path(slope) if np.any(x)}
    assert moved == {"['lm_head']['kernel']"}  # it comes after the side network, and is frozen


# Sizes that tell of whom an array is: 96 and 32 are inside of the model's blocks, 64 is of its hidden states.
CONFIG = DecoderConfig(
    vocab_size=40, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=2,
)  # fmt: skip


def backward(method, scan):
    """The shapes that the backward pass is given by the forward one, and those that all products are of."""
    model, ids = Decoder(CONFIG, scan=scan), jax.ShapeDtypeStruct((5, 7), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    tuned = jax.eval_shape(lambda p: method(p, model), params)
    trainable, frozen = jpeft.partition(tuned)

    def loss(trainable, frozen, ids):
        return jnp.sum(jpeft.apply(model, {"params": jpeft.combine(trainable, frozen)}, ids) ** 2)

    forward = lambda t, frozen, ids: jax.vjp(lambda t: loss(t, frozen, ids), t)[1]
    kept = [x.shape for x in jax.tree.leaves(jax.eval_shape(forward, trainable, frozen, ids))]
    products = []

    def walk(jaxpr, times):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                shapes = [v.aval.shape for v in (*eqn.invars, *eqn.outvars)]
                products.extend(times * [shapes])
            for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    walk(inner, times * (eqn.params["length"] if eqn.primitive.name == "scan" else 1))

    walk(jax.make_jaxpr(jax.grad(loss))(trainable, frozen, ids).jaxpr, 1)
    return kept, products


LADDER = lambda params, model: jpeft.ladder(params, model=model, reduction=4)
LORA = lambda params, model: jpeft.lora(params, rank=3, sites=SITES[model.scan])
SITES = {
    scan: jpeft.sites(
        Decoder(CONFIG, scan=scan),
        jax.eval_shape(Decoder(CONFIG, scan=scan).init, jax.random.key(0), jnp.zeros((5, 7), jnp.int32)),
        jnp.zeros((5, 7), jnp.int32),
    )
    for scan in (False, True)
}


def inside(shape):
    return 96 in shape or 32 in shape


def of_model(shapes):
    return (64, 64) in shapes or any(map(inside, shapes))


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_nothing_of_the_model_is_kept_or_gone_back_through(scan):
    kept, products = backward(LADDER, scan)
    taps = [(3, 5, 7, 64)] if scan else 3 * [(5, 7, 64)]
    activations = sorted(shape for shape in kept if shape[-1:] == (64,) and 5 in shape)
    assert activations == sorted([*taps, (5, 7, 64)])  # and the embedded tokens, for what reads them
    assert not [shape for shape in kept if inside(shape)]
    # Of a layer: query, key, value, scores, mixture, out; gate, up and down. Each once, for nothing goes back.
    assert sum(map(of_model, products)) == 3 * 9

    kept, products = backward(LORA, scan)  # what the same measures say of a method that goes back
    assert [shape for shape in kept if inside(shape)]
    assert sum(map(of_model, products)) > 2 * 3 * 9


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_nodes_that_train_in_the_model_change_nothing(scan):
    """Of LoRA there are the forward products alone: of a layer one for each side of gate, up and down inside of it."""
    kept, products = backward(lambda params, model: LADDER(LORA(params, model), model), scan)
    assert not [shape for shape in kept if inside(shape)]
    assert sum(map(of_model, products)) == 3 * (9 + 3)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_caches(scan):
    """In pieces, with padding, over a quantized model with frozen nodes beside its blocks."""
    model = subject("decoder", scan)
    inner = jpeft.chain(jpeft.int8(), jpeft.bottleneck(placement="block", width=3))(model.params, sites=model.sites)
    inner = jax.tree.map(lambda x: x + 0.1 if jnp.issubdtype(x.dtype, jnp.floating) else x, inner)
    tuned, (ids, mask) = made(model, inner), (model.args[0], jnp.ones((2, 6), jnp.int32).at[1, :2].set(0))
    run = jax.jit(lambda ids, mask, cache: jpeft.apply(model.model, {"params": tuned}, ids, mask, cache=cache))
    cache, found = model.model.init_cache(2, 6), []
    for piece in (slice(0, 3), slice(3, 5), slice(5, 6)):
        y, cache = run(ids[:, piece], mask[:, piece], cache)
        found.append(y)
    want = jax.jit(lambda: jpeft.apply(model.model, {"params": tuned}, ids, mask))()
    close(jnp.concatenate(found, axis=1)[:, 2:], want[:, 2:])
    tokens = jpeft.generate(model.model, tuned, ids, max_new_tokens=3).tokens
    text = ids
    for n in range(3):
        more = jnp.pad(text, [(0, 0), (0, 3 - n)])
        logits = run(more, jnp.ones_like(more), None)[:, text.shape[1] - 1]
        assert (tokens[:, n] == jnp.argmax(logits, axis=-1)).all()
        text = jnp.concatenate([text, tokens[:, n : n + 1]], axis=1)


def test_taps_are_what_blocks_return_with_their_nodes():
    model = subject("decoder")
    inner = jpeft.bottleneck(model.params, placement="block", width=3, sites=model.sites)
    tuned = jpeft.ladder(inner, model=model.model, reduction=2)
    close(model.run(tuned), model.run(jpeft.ladder(model.params, model=model.model, reduction=2)))
    last = tuned["layers_1"]["bottleneck"]
    moved = tuned | {"layers_1": tuned["layers_1"] | {"bottleneck": last.replace(up_bias=last.up_bias + 1)}}
    assert np.abs(model.run(moved) - model.run(tuned)).max() > 1e-2


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_pruned(scan):
    """What is left are the hidden states, units and places in heads that are large, in rows and columns alike."""
    config = DecoderConfig(vocab_size=20, hidden_size=16, intermediate_size=12, num_hidden_layers=2, qk_norm=True,
                           num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    model, ids = Decoder(config, scan=scan), jnp.arange(6)[None]
    params = shaken(model.init(jax.random.key(0), ids)["params"], jax.random.key(1))
    stream, units = jnp.array([1, 2, 5, 6, 8, 11, 12, 15]), jnp.array([0, 3, 4, 7, 9, 10])
    places = jnp.array([0, 3, 4, 7])  # of 8 in a head, of which rotations pair 0 with 4
    heads = jnp.concatenate([places, 8 + places])

    def large(path, x):
        """Ten times larger at the places that are to be left."""
        name = "/".join(k.key for k in path)
        parts = {"embed/": stream, "/mlp/(up|gate)/": units, "/query/": heads, "/(key|value)/": places}
        where = next((where for part, where in parts.items() if re.search(part, name)), None)
        return x if where is None else x.at[..., where].multiply(10)

    params = jax.tree_util.tree_map_with_path(large, params)
    node = jax.jit(lambda p: jpeft.ladder(p, model=model, reduction=2, init="pruned"))(params)["ladder"]
    own, found = (tree["layers" if scan else "layers_1"] for tree in (params, node.side))
    last = lambda x: x[1] if scan else x
    for path, rows, columns in (
        (("attention", "query"), stream, heads),
        (("attention", "value"), stream, places),
        (("attention", "out"), heads, stream),
        (("mlp", "up"), stream, units),
        (("mlp", "down"), units, stream),
    ):
        want = last(own[path[0]][path[1]]["kernel"])[rows][:, columns]
        close(last(found[path[0]][path[1]]["kernel"]), want)
    close(last(found["attention"]["key_norm"]["scale"]), last(own["attention"]["key_norm"]["scale"])[places])
    close(last(found["mlp_norm"]["scale"]), last(own["mlp_norm"]["scale"])[stream])
    close(node.side["norm"]["scale"], params["norm"]["scale"][stream])


def test_pruned_of_fused_kernels():
    """The same units of the gate and of what it is multiplied with."""
    config = DecoderConfig(vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1, fused=True,
                           num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    model = Decoder(config)
    params = shaken(model.init(jax.random.key(0), jnp.ones((1, 3), jnp.int32))["params"], jax.random.key(1))
    down = params["layers_0"]["mlp"]["down"]
    down["kernel"] = down["kernel"].at[jnp.array([1, 4, 5, 6, 7, 10])].multiply(100)
    found = jpeft.ladder(params, model=model, reduction=2, init="pruned")["ladder"].side["layers_0"]["mlp"]
    stream = jnp.sort(jnp.argsort(-jnp.abs(params["embed"]["embedding"]).sum(0))[:4])
    columns = jnp.array([1, 4, 5, 6, 7, 10, 13, 16, 17, 18, 19, 22])
    close(found["gate_up"]["kernel"], params["layers_0"]["mlp"]["gate_up"]["kernel"][stream][:, columns])


def test_pruning_refuses_experts():
    config = DecoderConfig(vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_experts=2,
                           num_experts_per_tok=1, num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    model = Decoder(config)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 3), jnp.int32))["params"]
    with pytest.raises(ValueError, match=r"(?s)at random.*layers_0/moe/\w+.*: \(2, "):
        jax.eval_shape(lambda p: jpeft.ladder(p, model=model, reduction=2, init="pruned"), params)


def test_behind_prompts():
    model = subject("decoder")
    tuned = made(model, jpeft.prompt(model.params, length=3))
    rows = tuned["embed"]["prompt"].rows
    other = tuned | {"embed": tuned["embed"] | {"prompt": tuned["embed"]["prompt"].replace(rows=-rows)}}
    assert model.run(tuned).shape == (2, 6, 32)
    assert np.abs(model.run(other) - model.run(tuned)).max() > 1e-3


@pytest.mark.slow
def test_classifier():
    config = EncoderConfig(vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
                           num_attention_heads=2, max_position_embeddings=9)  # fmt: skip
    model, ids = Classifier(config, 3), jnp.arange(6).reshape(2, 3)
    params = model.init(jax.random.key(0), ids)["params"]
    tuned = jpeft.chain(jpeft.ladder(model=model, reduction=2), jpeft.unfreeze(targets="head/.*"))(params)
    assert tuned["ladder"].outlet == "encoder" and not tuned["ladder"].side["head"]
    trainable, frozen = jpeft.partition(tuned)
    loss = lambda t: jnp.sum(jpeft.apply(model, {"params": jpeft.combine(t, frozen)}, ids) ** 2)
    slope = jax.jit(jax.grad(loss))(trainable)
    assert all(np.any(x) for x in jax.tree.leaves(slope))


@pytest.mark.slow
def test_t5():
    """The side decoder attends to what the side encoder has made of the text."""
    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2)
    model, ids = T5(config), jnp.array([[3, 1, 4, 1]])
    params = shaken(model.init(jax.random.key(0), ids, None, ids)["params"], jax.random.key(2))
    tuned = jpeft.ladder(params, model=model, reduction=2, inputs=(ids, None, ids))
    assert tuned["ladder"].outlet == "decoder/norm"
    logits = jax.jit(lambda ids, written: jpeft.apply(model, {"params": tuned}, ids, None, written))
    written = jnp.zeros((1, 4), jnp.int32)
    assert np.abs(logits(ids, written) - logits(ids + 1, written)).max() > 1e-3
    found = jpeft.generate(model, tuned, ids, max_new_tokens=3).tokens[0]
    for n, token in enumerate(found):
        assert jnp.argmax(logits(ids, written)[0, n]) == token
        written = written.at[0, n + 1].set(token)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": 3}, r"3 does not divide all widths of the model: {'hidden_size': 16, 'intermediate_size': 32}"),
        ({"reduction": 0}, "`reduction` 0"),
        ({"outlet": "norms"}, "'norms' matches no module"),
        ({"init": "zero"}, "`init` is 'zero'"),
        ({"model": jpeft.models.stack_layers}, "What is narrow in a narrow function"),
    ],
)
def test_refuses(options, message):
    model = subject("decoder")
    with pytest.raises(ValueError, match=message):
        jpeft.ladder(model.params, **{"model": model.model, "reduction": 2} | options)


def test_refuses_a_second_one():
    model = subject("decoder")
    with pytest.raises(ValueError, match="has a ladder"):
        made(model, made(model))


def test_options_of_nodes_in_the_model():
    """The side network is called without them: a prompt's tasks are no argument of its own."""
    model = subject("decoder")
    told = made(model, jpeft.mpt(model.params, length=2, tasks=2))
    run = lambda tasks: jpeft.apply(model.model, {"params": told}, *model.args, task_ids=jnp.array(tasks))
    first, second = run([0, 0]), run([1, 1])
    assert np.abs(first - second).max() > 1e-4
    close(run([1, 0])[0], second[0])
