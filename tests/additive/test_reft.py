"""ReFT against its formula, written into the models by hand, and the positions of tokens, counted row by row."""

import functools
import types

import by_hand
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft._node import cast
from jpeft.models import T5, T5Config
from jpeft.testing import shaken, subject


IDS = jax.random.randint(jax.random.key(1), (3, 7), 0, 28)
MASKS = {
    "none": jnp.ones((3, 7), jnp.int32),
    "right": jnp.array([[1] * 7, [1] * 5 + [0] * 2, [1] + [0] * 6]),
    "left": jnp.array([[1] * 7, [0] * 2 + [1] * 5, [0] * 6 + [1]]),
    "both": jnp.array([[0] + [1] * 6, [0, 0, 1, 1, 1, 0, 0], [1, 0, 1, 1, 0, 1, 1]]),
}


def close(found, want, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


def tuned(model, **options):
    """The parameters with edits, all of their arrays random."""
    params = jpeft.reft(model.params, **{"rank": 3, "sites": model.sites} | options)
    trainable, frozen = jpeft.partition(params)
    return jpeft.combine(shaken(trainable, jax.random.key(8), 0.3), frozen)


def product(v):
    """The first columns of the product of reflections, one by one."""
    turns = [jnp.eye(len(v)) - 2 * jnp.outer(u, u) / (u @ u) for u in v.T]
    return functools.reduce(jnp.matmul, turns)[:, : v.shape[1]]


def counted(mask, first, last):
    """Of every row, the places of its first and last tokens."""
    chosen = np.zeros(mask.shape, bool)
    for row, real in zip(chosen, np.asarray(mask), strict=True):
        places = np.flatnonzero(real)
        row[places[:first]] = row[places[max(len(places) - last, 0) :]] = True
    return chosen


FORMULAS = {
    "loreft": lambda h, w, b, r: (h @ w + b - h @ product(r)) @ product(r).T,
    "noreft": lambda h, w, b, r: (h @ w + b - h @ r) @ r.T,
    "direft": lambda h, w, b, r: (h @ w + b) @ product(r).T,
    "nodireft": lambda h, w, b, r: (h @ w + b) @ r.T,
}


def by_formula(model, params, mask, method, chosen):
    def around(path, x, y):
        node = params.get(path, {}).get("reft")
        if node is None:
            return y
        f = FORMULAS[method](y, node.source, node.bias[None, None], node.rotation)
        return y + jnp.where(chosen[..., None], f, 0.0)

    run = by_hand.encoder if "embeddings" in params else by_hand.decoder
    return run(model.model.config, params, IDS, mask, around)


@pytest.mark.parametrize(
    ("kind", "method", "side", "positions"),
    [
        ("decoder", "loreft", "left", "f2+l1"),
        ("decoder", "noreft", "right", "l2"),
        ("encoder", "direft", "both", "f3+l3"),
        ("encoder", "nodireft", "right", "all"),
    ],
)
def test_formula(kind, method, side, positions):
    model, mask = subject(kind), MASKS[side]
    params = tuned(model, method=method, positions=positions)
    counts = {"all": (7, 7), "l2": (0, 2)}.get(positions) or (int(positions[1]), int(positions[4]))
    chosen = jnp.ones(mask.shape, bool) if positions == "all" else counted(mask, *counts)
    real = mask.astype(jnp.float32)[..., None]  # what padding comes to, nobody asks
    run = lambda params: jpeft.apply(model.model, {"params": params}, IDS, mask) * real
    y, grads = by_hand.results(run, params)
    want, slopes = by_hand.results(lambda params: by_formula(model, params, mask, method, chosen) * real, params)
    close(y, want)
    close(grads, slopes, 1e-4)
    assert np.abs(y - jax.jit(run)(model.params)).max() > 0.1


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x


class Echo(nn.Module):
    """Zeros, so that what an edit adds is all there is."""

    @nn.compact
    def __call__(self, input_ids, attention_mask=None, segment_ids=None, labels=None, cache=None):
        return Layer(name="layers_0")(jnp.zeros((*input_ids.shape, 4)))


def edited(positions, ids=IDS, **arguments):
    """Where the hidden states are edited."""
    sites = jpeft.sites(Echo(), {"params": {}}, ids)
    params = jpeft.reft({"layers_0": {}}, rank=2, positions=positions, sites=sites)
    return np.any(jpeft.apply(Echo(), {"params": params}, ids, **arguments) != 0, axis=-1)


@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize(("positions", "first", "last"), [("f1", 1, 0), ("l2", 0, 2), ("f2+l3", 2, 3), ("l9+f1", 1, 9)])
def test_positions_are_those_of_tokens(side, positions, first, last):
    """Whatever the padding, and where a row has fewer tokens than positions."""
    np.testing.assert_array_equal(edited(positions, attention_mask=MASKS[side]), counted(MASKS[side], first, last))


def test_every_segment_has_its_own():
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2], [1, 2, 2, 2, 2, 3, 3], [1, 1, 1, 1, 1, 1, 1]])
    want = sum(counted(segments == n, 1, 2) for n in (1, 2, 3))
    np.testing.assert_array_equal(edited("f1+l2", segment_ids=segments), want)


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_prompt_is_what_comes_before_the_labels(side):
    labels = jnp.where(MASKS[side] > 0, IDS, -100).at[0, :4].set(-100).at[1, 2:4].set(-100).at[0, 5].set(-100)
    prompt = {
        "right": [[1, 1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0], [1] + [0] * 6],  # a first token is never predicted
        "left": [[1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0], [0] * 6 + [1]],
    }
    found = edited("f1+l1", attention_mask=MASKS[side], labels=labels)
    np.testing.assert_array_equal(found, counted(np.array(prompt[side]), 1, 1))
    np.testing.assert_array_equal(edited("f1", labels=labels[:, 0]), counted(MASKS["none"], 1, 0))  # of classes


def test_labels_within_segments():
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2]])
    labels = jnp.array([[-100, -100, 5, -100, -100, -100, 5]])
    found = edited("l1", IDS[:1], segment_ids=segments, labels=labels)
    np.testing.assert_array_equal(found, [[0, 1, 0, 0, 0, 1, 0]])


def test_prompt_mask():
    prompt = jnp.array([[0, 1, 1, 1, 0, 0, 0]] * 3)
    found = edited("l2", attention_mask=MASKS["none"], prompt_mask=prompt)
    np.testing.assert_array_equal(found, counted(prompt, 0, 2))


def test_no_prompt_is_left_in_a_filled_cache():
    empty, filled = (types.SimpleNamespace(filled=x) for x in (False, True))
    np.testing.assert_array_equal(edited("f1+l1", cache=empty), counted(MASKS["none"], 1, 1))
    assert not edited("f1+l1", cache=filled).any()
    assert edited("all", cache=filled).all()


@pytest.mark.parametrize(("side", "positions"), [("left", "f1+l2"), ("right", "f2+l1"), ("left", "all")])
def test_a_cache_gives_the_same_tokens(side, positions):
    """Those of all text computed anew, in which the prompt is what it was."""
    model, count, rows = subject("decoder"), 4, jnp.arange(3)
    params = tuned(model, positions=positions)
    run = jax.jit(lambda ids, *args, **how: jpeft.apply(model.model, {"params": params}, ids, *args, **how))
    prompt = jnp.pad(MASKS[side], [(0, 0), (0, count)])
    mask = prompt.at[:, 7:].set(1)
    places = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    marks = {} if positions == "all" else {"prompt_mask": prompt}
    text, last = jnp.pad(IDS, [(0, 0), (0, count)]), 6 - jnp.argmax(jnp.flip(MASKS[side], 1), axis=1)
    logits, cache = run(IDS, mask[:, :7], places[:, :7], cache=model.model.init_cache(3, 7 + count))
    logits = logits[rows, last]
    for n in range(7, 7 + count):
        tokens = jnp.argmax(run(text, mask, places, **marks)[rows, last], axis=-1)
        np.testing.assert_array_equal(jnp.argmax(logits, axis=-1), tokens)
        text, last = text.at[:, n].set(tokens), jnp.full(3, n)
        logits, cache = run(text[:, n : n + 1], mask[:, n : n + 1], places[:, n : n + 1], cache=cache)
        logits = logits[:, 0]


@pytest.mark.parametrize("length", [1, 4])
def test_generated_tokens(length):
    """`generate` reads the last token of a prompt in its first step: the same tokens as of the whole text anew."""
    model = subject("decoder")
    params, ids = tuned(model, positions="f1+l2"), IDS[:, :length]
    found = jpeft.generate(model.model, params, ids, max_new_tokens=4, pad_to_multiple_of=3).tokens
    run = jax.jit(lambda text, mask: jpeft.apply(model.model, {"params": params}, text, prompt_mask=mask))
    text, mask = jnp.pad(ids, [(0, 0), (0, 4)]), jnp.pad(jnp.ones_like(ids), [(0, 0), (0, 4)])
    for n in range(4):
        tokens = jnp.argmax(run(text, mask)[:, length + n - 1], axis=-1)
        np.testing.assert_array_equal(found[:, n], tokens)
        text = text.at[:, length + n].set(tokens)


@pytest.mark.parametrize("outer", ["prompt", "reft"])
def test_embeddings_of_a_prompt_are_no_tokens(outer):
    """As if tokens stood there which are not those of the edited prompt."""
    model, mask, rows = subject("decoder"), MASKS["right"], jax.random.normal(jax.random.key(2), (4, 16))
    edits = tuned(model, positions="f1+l2")
    own = jpeft.reft(jpeft.prompt(model.params, length=4, init=rows), rank=3, positions="f1+l2", sites=model.sites)
    if outer == "prompt":
        own = jpeft.prompt(edits, length=4, init=rows)
    own |= {name: layer for name, layer in edits.items() if name.startswith("layers")}
    front = lambda x, row: jnp.concatenate([jnp.broadcast_to(row[None], (3, 4)).astype(x.dtype), x], axis=1)
    embed = {"embedding": model.params["embed"]["embedding"].at[28:].set(rows)}
    ids, wide = front(IDS, jnp.arange(28, 32)), front(mask, jnp.ones(4))
    tokens = front(mask, jnp.zeros(4))
    want = jpeft.apply(model.model, {"params": edits | {"embed": embed}}, ids, wide, prompt_mask=tokens)
    close(jpeft.apply(model.model, {"params": own}, IDS, mask), want[:, 4:])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_columns_stay_orthonormal(dtype):
    """In float32, after steps of AdamW with weight decay, in a model of any dtype."""
    model = subject("decoder")
    params = cast(model.params, dtype)
    trainable, frozen = jpeft.partition(jpeft.reft(params, rank=5, sites=model.sites))
    tx = optax.adamw(0.3, weight_decay=0.1)
    state = tx.init(trainable)
    start = trainable["layers_0"]["reft"].columns()
    grad = jax.jit(jax.grad(lambda t: model.loss(jpeft.combine(t, frozen))))
    for _ in range(3):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grad(trainable), state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    for n in range(2):
        r = trainable[f"layers_{n}"]["reft"].columns()
        assert r.dtype == jnp.float32
        np.testing.assert_allclose(r.T @ r, np.eye(5), atol=1e-6)
    assert np.abs(trainable["layers_0"]["reft"].columns() - start).max() > 0.1


def test_vectors_are_not_rounded():
    node = tuned(subject("decoder"))["layers_0"]["reft"]
    half = node.within(jnp.bfloat16)
    assert half.bias.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half.columns(), node.columns())


def test_small_edits_are_not_rounded_away():
    """Of W - R, where W has left R by less than bfloat16 tells numbers of its size apart."""
    node = tuned(subject("decoder"), positions="all")["layers_0"]["reft"]
    step = 1e-4 * jax.random.normal(jax.random.key(0), node.source.shape)
    node = node.replace(source=node.columns() + step, bias=jnp.zeros(3))
    h = jax.random.normal(jax.random.key(1), (2, 5, 16))
    found = node.within(jnp.bfloat16).change(h.astype(jnp.bfloat16), None)
    close(found.astype(jnp.float32), h @ step @ node.columns().T, 0.03)


def test_columns_are_orthonormal_of_any_vectors():
    """Also of vectors that are all but the same."""
    v = jax.random.normal(jax.random.key(0), (16, 1)) + 1e-3 * jax.random.normal(jax.random.key(1), (16, 6))
    node = tuned(subject("decoder"))["layers_0"]["reft"].replace(rotation=v)
    np.testing.assert_allclose(node.columns(), product(v), atol=1e-5)
    np.testing.assert_allclose(node.columns().T @ node.columns(), np.eye(6), atol=1e-5)


def test_projection():
    """h' R = h W + b, and h' is h in what is orthogonal to R."""
    node = tuned(subject("decoder"), positions="all")["layers_0"]["reft"]
    h = jax.random.normal(jax.random.key(0), (2, 5, 16))
    new, r = h + node.change(h, None), node.columns()
    close(new @ r, h @ node.source + node.bias[None, None])
    rest = jnp.eye(16) - r @ r.T
    close(new @ rest, h @ rest)


@pytest.mark.parametrize("method", FORMULAS)
def test_identity_start(method):
    model = subject("encoder")
    params = jpeft.reft(model.params, rank=3, method=method, init="identity", positions="all", sites=model.sites)
    assert not params["layers_0"]["reft"].bias.any()
    close(model.run(params), model.output)
    random = jpeft.reft(model.params, rank=3, method=method, positions="all", sites=model.sites)
    assert np.abs(model.run(random) - model.output).max() > 0.1


@pytest.mark.parametrize("method", ["loreft", "direft"])
def test_all_positions_fold_into_a_projection(method):
    """K' = K T and b' = b T + c R^T with T = I + W R^T, or I + (W - R) R^T."""
    model = subject("encoder")
    params = tuned(model, method=method, positions="all", targets=".*/mlp/down")
    merged = model.params
    for n in range(2):
        layer, node = merged[f"layers_{n}"], params[f"layers_{n}"]["mlp"]["down"]["reft"]
        r = node.columns()
        turn = jnp.eye(16) + (node.source - (r if method == "loreft" else 0 * r)) @ r.T
        own = layer["mlp"]["down"]
        own = {"kernel": own["kernel"] @ turn, "bias": own["bias"] @ turn + node.bias @ r.T}
        merged = merged | {f"layers_{n}": layer | {"mlp": layer["mlp"] | {"down": own}}}
    close(model.run(params), model.run(merged))


def test_arrays_for_first_and_last():
    """A chain of two: one tells which tokens are the prompt's, each has arrays of its own."""
    both = jpeft.chain(jpeft.reft(rank=2, positions="f1"), jpeft.reft(rank=3, positions="l1"))
    params = both({"layers_0": {}}, sites=jpeft.sites(Echo(), {"params": {}}, IDS))
    assert sorted(params) == ["layers_0", "reft_positions"]
    y = jpeft.apply(Echo(), {"params": params}, IDS, MASKS["right"])[0]
    first, last = (params["layers_0"][name] for name in ("reft", "reft_1"))
    close(y[0], first.bias @ first.columns().T)
    close(y[6], last.bias @ last.columns().T)
    assert not y[1:6].any()


@pytest.mark.parametrize("scan", [False, True])
def test_at_rest(scan):
    """R itself in place of reflections: to the same effect."""
    model = subject("decoder", scan)
    params = tuned(model)
    fixed = jpeft.collapse(params)
    assert not fixed["layers" if scan else "layers_1"]["reft"].orthonormal
    close(model.run(fixed), model.run(params))


def test_dropout_drops_the_edit_alone():
    node = tuned(subject("decoder"), positions="all", dropout=0.5)["layers_0"]["reft"]
    h = jax.random.normal(jax.random.key(0), (2, 5, 16))
    plain, dropped = node.change(h, None), node.change(h, jax.random.key(1))
    kept = dropped != 0
    assert 0.3 < kept.mean() < 0.7
    close(dropped, jnp.where(kept, 2 * plain, 0.0))


def test_rematerialized_layers():
    model = subject("decoder", scan=True)
    params = tuned(model, positions="f1+l2")
    again = model.model.clone(remat=True)
    found = by_hand.results(lambda p: jpeft.apply(again, {"params": p}, *model.args), params)
    close(found, by_hand.results(model, params))


def test_encoder_of_two():
    """Whose layers know nothing of the decoder's tokens."""
    model = T5(T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4))
    params = shaken(jax.jit(model.init)(jax.random.key(0), IDS, None, IDS)["params"], jax.random.key(3))
    sites = jpeft.sites(model, {"params": params}, IDS, None, IDS)
    how = {"rank": 2, "sites": sites, "positions": "l1"}
    own = jpeft.reft(params, targets=r"encoder/.*layers?_0", within="encoder", **how)
    call = jax.jit(lambda params, ids, mask, targets: jpeft.apply(model, {"params": params}, ids, mask, targets))
    y = call(own, IDS, MASKS["right"], IDS)[1]
    close(y, call(own, IDS[1:2, :5], jnp.ones((1, 5), jnp.int32), IDS[1:2])[0])
    assert np.abs(y - call(params, IDS, MASKS["right"], IDS)[1]).max() > 1e-3
    with pytest.raises(ValueError, match="two sequences"):
        call(jpeft.reft(params, **how), IDS, None, IDS)
    with pytest.raises(ValueError, match=r"Hidden states of shape \(3, 7, 16\) have no positions"):
        call(jpeft.reft(params, within="encoder", **how), IDS, None, IDS)


def test_other_masks_need_a_prompt_mask():
    wide = jnp.ones((3, 1, 1, 7))
    with pytest.raises(ValueError, match=r"\{'attention_mask': \(3, 1, 1, 7\)\}"):
        edited("f1", attention_mask=wide)
    found = edited("f1", attention_mask=wide, prompt_mask=MASKS["left"])
    np.testing.assert_array_equal(found, counted(MASKS["left"], 1, 0))


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"method": "loft"}, "`method` is 'loft'"),
        ({"init": "zero"}, "`init` is 'zero'"),
        ({"positions": "f1l1"}, "`positions` is 'f1l1'"),
        ({"positions": "f0"}, "`positions` is 'f0'"),
        ({"positions": ""}, "`positions` is ''"),
        ({"rank": 17}, "ranks from 1 to 16, dropout in .*, not rank=17"),
        ({"dropout": 1.0}, "not rank=4, dropout=1.0"),
        ({"within": "model"}, "'model' matches no module"),
        ({"sites": None}, "sites = jpeft.sites"),
    ],
)
def test_faults(options, fault):
    model = subject("decoder")
    with pytest.raises(ValueError, match=fault):
        jpeft.reft(model.params, **{"sites": model.sites} | options)
