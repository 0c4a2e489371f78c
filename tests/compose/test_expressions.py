"""Expressions of adapters, against the sums that they stand for."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft import Average, Parallel, Sequence, Split
from jpeft.testing import shaken, subject


BATCH, SEQ, WIDTH = 4, 5, 8
IDS = jax.random.randint(jax.random.key(0), (BATCH, SEQ), 0, 16)
NAMES = ("a", "b", "c")


class Net(nn.Module):
    """Token embeddings through one kernel, so that what adapters of it add is linear."""

    @nn.compact
    def __call__(self, ids, cache=None):
        return nn.Dense(WIDTH, use_bias=False, name="dense")(nn.Embed(16, WIDTH, name="embed")(ids))


NET = Net()
PARAMS = NET.init(jax.random.key(1), IDS)["params"]
BASE = NET.apply({"params": PARAMS}, IDS)


def stacked(make):
    trees = [jpeft.partition(make()) for _ in NAMES]
    trees = [jpeft.combine(shaken(t, jax.random.key(n), 0.5), f) for n, (t, f) in enumerate(trees)]
    return trees, jpeft.stack(dict(zip(NAMES, trees, strict=True)))


LORAS, OF_LORAS = stacked(lambda: jpeft.lora(PARAMS, rank=2, targets="dense/kernel"))
HIDDEN, OF_HIDDEN = stacked(lambda: jpeft.bottleneck(PARAMS, width=3, targets="dense"))


def run(tree, adapters, ids=IDS, **how):
    return jpeft.apply(NET, {"params": tree}, ids, adapters=adapters, **how)


A, B, C = (run(tree, None) - BASE for tree in LORAS)
ROWS, TOKENS = (np.arange(n).reshape(shape) for n, shape in ((BATCH, (-1, 1, 1)), (SEQ, (1, -1, 1))))
SUMS = {
    "one": ("b", B),
    "a number": (2, C),
    "average": (Average("a", "b"), (A + B) / 2),
    "weights": (Average("a", "c", weights=[2.0, -1.0]), 2 * A - C),
    "a sequence": (Sequence("a", "b"), A + B),
    "the same twice": (Sequence("a", "a"), 2 * A),
    "rows": (Parallel("c", "a"), np.where(ROWS < 2, C, A)),
    "rows of sizes": (Parallel("c", "a", "b", sizes=[1, 0, 3]), np.where(ROWS < 1, C, B)),
    "names of rows": (["a", "c", "c", "b"], np.select([ROWS == 0, ROWS == 3], [A, B], C)),
    "tokens": (Split("a", "b", "c", at=[1, 3]), np.select([TOKENS < 1, TOKENS < 3], [A, B], C)),
    "an empty range": (Split("a", "b", at=[0]), B),
    "sequence of a split": (Sequence("a", Split("b", "c", at=[2])), A + np.where(TOKENS < 2, B, C)),
    "rows of tokens": (
        Parallel(Split("a", "b", at=[4]), Average("b", "c")),
        np.where(ROWS < 2, np.where(TOKENS < 4, A, B), (B + C) / 2),
    ),
    "average of averages": (Average(Average("a", "b"), Sequence("b", "c")), ((A + B) / 2 + B + C) / 2),
}


@pytest.mark.parametrize("name", SUMS)
def test_is_its_sum(name):
    adapters, expected = SUMS[name]
    np.testing.assert_allclose(run(OF_LORAS, adapters) - BASE, expected, atol=1e-5)
    assert np.abs(expected).max() > 0.1


def test_a_sequence_of_hidden_nodes_is_one_after_another():
    """As they stand above each other in one tree; and the order counts."""
    above = jpeft.bottleneck(HIDDEN[0], width=3, targets="dense")
    above["dense"]["bottleneck_1"] = HIDDEN[2]["dense"]["bottleneck"]
    expected = run(above, None)
    np.testing.assert_allclose(run(OF_HIDDEN, Sequence("a", "c")), expected, atol=1e-5)
    assert np.abs(run(OF_HIDDEN, Sequence("c", "a")) - expected).max() > 1e-2
    nested = run(OF_HIDDEN, Parallel(Sequence("a", "c"), "b"))
    np.testing.assert_allclose(nested[:2], expected[:2], atol=1e-5)
    np.testing.assert_allclose(nested[2:], run(HIDDEN[1], None)[2:], atol=1e-5)


def test_a_change_of_numbers_is_no_trace():
    traces = []

    @jax.jit
    def mean(weights):
        traces.append(1)
        return run(OF_LORAS, Average("a", Split("b", "c", at=[2]), weights=weights))

    for w in (0.5, -2.0):
        expected = w * A + (1 - w) * np.where(TOKENS < 2, B, C)
        np.testing.assert_allclose(mean(jnp.array([w, 1 - w])) - BASE, expected, atol=1e-5)
    assert len(traces) == 1


def test_ranges_go_on_with_a_cache():
    """Positions are those of the text: a later token is in the range that it would be in without a cache."""
    adapters = Split("a", "b", at=[3])
    cache = jpeft.models.Cache.empty(1, BATCH, SEQ, 1, 1, jnp.float32).close(3)
    found = run(OF_LORAS, adapters, IDS[:, 3:], cache=cache)
    np.testing.assert_allclose(found, run(OF_LORAS, adapters)[:, 3:], atol=1e-5)


def test_uniform_choices_merge():
    for adapters, expected in ((Average("a", "b", weights=[1.0, -2.0]), A - 2 * B), ("c", C)):
        found = jpeft.merge(jpeft.activate(OF_LORAS, adapters))
        assert found["dense"]["kernel"].shape == (WIDTH, WIDTH)
        np.testing.assert_allclose(run(found, None) - BASE, expected, atol=1e-5)
    with pytest.raises(ValueError, match="differ by row or token"):
        jpeft.merge(jpeft.activate(OF_LORAS, jnp.array([0, 1])))


def test_unstacked_again():
    """To the same effect, with other ranks filled up."""
    trees = [jpeft.lora(PARAMS, rank=n, alpha=4, targets="dense/kernel") for n in (1, 3)]
    trees = [jpeft.combine(shaken(t, jax.random.key(3)), f) for t, f in map(jpeft.partition, trees)]
    for name, tree in jpeft.unstack(jpeft.stack(trees)).items():
        assert isinstance(tree["dense"]["kernel"], jpeft.LoRA)
        np.testing.assert_allclose(run(tree, None), run(trees[int(name)], None), atol=1e-5)
    for name, tree in jpeft.unstack(OF_HIDDEN).items():
        np.testing.assert_allclose(run(tree, None), run(HIDDEN[NAMES.index(name)], None), atol=1e-5)
    with pytest.raises(ValueError, match=r"no stack.*jpeft\.stack"):
        jpeft.unstack(LORAS[0])


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        (None, r"Which adapters\? There is a stack of them: a, b, c"),
        ("d", "no adapter 'd' in this stack: a, b, c"),
        (3, "no adapter 3"),
        (np.array([0, 1]), r"shape \(2,\) of int.*for 3 adapters and 4 rows of 5 tokens"),
        (np.ones(4), r"shape \(4,\) of float"),
        (np.ones((4, 6, 3)), r"shape \(4, 6, 3\)"),
        (Parallel("a", "b", "c"), r"4 rows cannot be divided among 3 adapters"),
        (Parallel("a", "b", sizes=[1, 2]), r"as \(1, 2\)"),
    ],
)
def test_refuses(adapters, message):
    with pytest.raises(ValueError, match=message):
        run(OF_LORAS, adapters)


def test_refuses_expressions_that_do_not_add_up():
    with pytest.raises(ValueError, match="at least one adapter"):
        Average()
    with pytest.raises(ValueError, match=r"2 adapters are averaged with weights of shape \(3,\)"):
        Average("a", "b", weights=[1, 2, 3])
    with pytest.raises(ValueError, match="2 adapters are divided at 1 rising"):
        Split("a", "b", at=[1, 2])
    with pytest.raises(ValueError, match="rising"):
        Split("a", "b", "c", at=[3, 1])
    with pytest.raises(ValueError, match="groups of rows of 1 sizes"):
        Parallel("a", "b", sizes=[4])


def test_refuses_adapters_without_a_stack():
    with pytest.raises(ValueError, match=r"no Stacked node.*jpeft\.stack"):
        run(LORAS[0], "a")


def test_refuses_to_stack():
    other = {**PARAMS, "dense": {"kernel": PARAMS["dense"]["kernel"] + 1}}
    with pytest.raises(ValueError, match=r"(?s)'1' was tuned on another base.*dense/kernel"):
        jpeft.stack([LORAS[0], jpeft.lora(other, rank=2, targets="dense/kernel")])
    with pytest.raises(ValueError, match="no adapters to stack"):
        jpeft.stack([])
    stuck = jpeft.chain(jpeft.dora(rank=1, targets="dense/kernel"), jpeft.prompt(length=2))(PARAMS)
    with pytest.raises(ValueError, match=r"(?s)  x: dense/kernel: DoRA.*  x: prompt_room: Room"):
        jpeft.stack({"x": stuck, "y": LORAS[0]})
    with pytest.raises(ValueError, match=r"dense/kernel: VeRA, which shares arrays"):
        jpeft.stack([jpeft.vera(PARAMS, rank=2, targets="dense/kernel")])


@pytest.mark.parametrize("trees", [LORAS, HIDDEN])
def test_is_saved_without_a_choice(tmp_path, trees):
    tree = jpeft.stack(dict(zip(NAMES, trees, strict=True)))
    jpeft.save(tmp_path / "adapters", jpeft.activate(tree, "a"))
    back = jpeft.restore(tmp_path / "adapters", PARAMS)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    np.testing.assert_array_equal(run(back, "c"), run(tree, "c"))


def test_half_precision_and_gradients():
    """In bfloat16, gradients reach the adapters that act and no others, by rows."""
    tree = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, OF_LORAS)
    assert run(tree, np.array([0, 2, 2, -1])).dtype == jnp.bfloat16
    trainable, frozen = jpeft.partition(OF_LORAS)
    ids = np.array([0, 2, 2, -1])
    grads = jax.grad(lambda t: jnp.sum(jnp.sin(run(jpeft.combine(t, frozen), ids))))(trainable)
    ((node,),) = grads["dense"]["kernel"].members
    found = np.abs(node.b).max(axis=(-2, -1))
    assert found[0] > 1e-3 and found[1] == 0 and found[2] > 1e-3
    alone = [jpeft.partition(tree) for tree in LORAS]
    own = jax.grad(lambda t: jnp.sum(jnp.sin(run(jpeft.combine(t, alone[2][1]), None)[1:3])))(alone[2][0])
    np.testing.assert_allclose(node.b[2], own["dense"]["kernel"].b, atol=1e-5)


class Shapes(nn.Module):
    """One kernel, called with what `of` makes of the token embeddings."""

    of: str

    @nn.compact
    def __call__(self, ids, other=None):
        x = nn.Embed(16, WIDTH, name="embed")(ids if other is None else other)
        dense = nn.Dense(WIDTH, use_bias=False, name="dense")
        if self.of == "rows and tokens on one axis":
            return dense(x.reshape(-1, WIDTH)).reshape(x.shape)
        if self.of == "table":
            return x + jnp.broadcast_to(dense(jnp.ones((8, WIDTH)))[:1], x.shape)
        return dense(x.mean(1) if self.of == "pooled" else x)


def shapes(of, adapters, ids=IDS, *args):
    return jpeft.apply(Shapes(of), {"params": OF_LORAS}, ids, *args, adapters=adapters)


def test_weights_of_tokens_are_of_no_rows():
    """Where there are as many of both, too: what a pooled layer returns has no tokens."""
    ids = IDS[:, :BATCH]
    weights = jnp.ones((BATCH, BATCH, 3))
    for adapters in (Split("a", "b", at=[2]), weights):
        with pytest.raises(ValueError, match=r"4 rows of 4 tokens, and what a layer returns .* \(4, 8\)"):
            shapes("pooled", adapters, ids)
    rows = shapes("pooled", Parallel("a", "b"), ids)
    np.testing.assert_allclose(rows[0], shapes("pooled", "a", ids)[0], atol=1e-5)


@pytest.mark.parametrize("length", [3, 7])
def test_weights_of_tokens_are_of_one_sequence(length):
    """A layer that sees another one, as in a decoder beside an encoder, is not given them moved."""
    other = jnp.ones((BATCH, length), jnp.int32)
    with pytest.raises(ValueError, match=f"4 rows of 5 tokens, and what a layer returns .* \\(4, {length}, 8\\)"):
        shapes("tokens", Split("a", "b", at=[2]), IDS, other)


@pytest.mark.parametrize(
    "adapters",
    [Split("a", "b", at=[2]), np.array([0, 2, 2, -1]), Parallel(Sequence("a", "b"), "c"), np.eye(3)[[0, 1, 2, 0]]],
)
def test_rows_and_tokens_on_one_axis(adapters):
    found = shapes("rows and tokens on one axis", adapters)
    np.testing.assert_allclose(found, run(OF_LORAS, adapters), atol=1e-5)


def test_rows_are_not_found_in_what_has_none():
    """Eight latents are not four rows of two tokens."""
    with pytest.raises(ValueError, match=r"for 4 rows, and what enters a layer is \(8, 8\)"):
        shapes("table", np.array([0, 1, 2, 0]))
    shapes("table", "a")


@pytest.mark.parametrize("adapters", [Split("a", "b", at=[3]), Split("b", "a", at=[5])])
def test_positions_with_a_prompt_in_the_base(adapters):
    """They are those of the tokens, in calls with a cache as in those without."""
    model = subject("decoder")
    trees = [jpeft.partition(jpeft.lora(model.params, rank=2, sites=model.sites)) for _ in "ab"]
    trees = [jpeft.combine(shaken(t, jax.random.key(n), 0.5), f) for n, (t, f) in enumerate(trees)]
    params = {"params": jpeft.prompt(jpeft.stack(dict(zip("ab", trees, strict=True))), length=2)}
    (ids, *_), net = model.args, model.model
    whole = jpeft.apply(net, params, ids, adapters=adapters)
    _, cache = jpeft.apply(net, params, ids[:, :4], cache=net.init_cache(2, 6), adapters=adapters)
    rest, _ = jpeft.apply(net, params, ids[:, 4:], cache=cache, adapters=adapters, allow_unused=True)
    np.testing.assert_allclose(rest, whole[:, 4:], atol=2e-5)
    assert np.abs(whole - jpeft.apply(net, params, ids, adapters="a")).max() > 1e-2


def test_refuses_rows_of_rows():
    with pytest.raises(ValueError, match="Parallel within Parallel"):
        Parallel(Sequence("a", Parallel("a", "b")), "c")


def test_refuses_numbers_that_there_are_not():
    with pytest.raises(ValueError, match=r"no adapters \[3, 7\] in this stack: a, b, c"):
        run(OF_LORAS, np.array([0, 3, 7, -1]))
    with pytest.raises(ValueError, match=r"no adapters \[3\]"):
        run(OF_LORAS, jnp.array([0, 3, 3, -1]))
    found = jax.jit(lambda ids: run(OF_LORAS, ids))(jnp.array([0, 3, 7, -1]))  # which nobody sees before the call runs
    assert np.isnan(found[1:3]).all() and np.isfinite(found[np.array([0, 3])]).all()


def test_refuses_stacks_of_stacks():
    for inner, path in ((OF_LORAS, "dense/kernel: StackedBranches"), (OF_HIDDEN, "dense/stack: StackedHidden")):
        with pytest.raises(ValueError, match=path):
            jpeft.stack([inner, LORAS[0]])


def test_unstacks_what_others_stand_on():
    trees = jpeft.unstack(jpeft.lora(jpeft.activate(OF_LORAS, "a"), rank=1, targets="dense/kernel"))
    np.testing.assert_allclose(run(trees["b"], None) - BASE, B, atol=1e-5)


def test_nodes_keep_their_order():
    """Beside one module, those of each adapter, whatever others have there."""
    node = lambda at, n: HIDDEN[n]["dense"]["bottleneck"].replace(at=at)
    tree = lambda *nodes: PARAMS | {"dense": PARAMS["dense"] | {f"x_{n}" if n else "x": x for n, x in enumerate(nodes)}}
    trees = [
        tree(node("output", 0), node("input", 1), node("output", 2)),
        tree(node("output", 1), node("output", 2), node("output", 0)),
    ]
    for n, alone in enumerate(trees):
        np.testing.assert_allclose(run(jpeft.stack(trees), n), run(alone, None), atol=1e-5)


@pytest.mark.parametrize("adapters", ["a", np.array([0, 1, 0, -1]), Sequence("a", "b")])
@pytest.mark.parametrize(
    "make",
    [
        lambda: jpeft.lora(PARAMS, rank=2, dropout=0.5, targets="dense/kernel"),
        lambda: jpeft.adamix_lora(PARAMS, rank=2, targets="dense/kernel"),
        lambda: jpeft.bottleneck(PARAMS, width=3, dropout=0.5, targets="dense"),
        lambda: jpeft.adamix(PARAMS, width=3, targets="dense"),
    ],
    ids=["lora", "adamix_lora", "bottleneck", "adamix"],
)
def test_what_is_random_stays_so(make, adapters):
    """Where a call has a key, and what is stacked trains."""
    _, tree = stacked(make)
    draw = lambda tree, n: run(tree, adapters, rngs=jax.random.key(n))
    rest = run(tree, adapters)
    assert np.abs(draw(tree, 0) - rest).max() > 1e-2
    assert np.abs(draw(tree, 0) - draw(tree, 4)).max() > 1e-2
    if isinstance(adapters, np.ndarray):
        np.testing.assert_array_equal(draw(tree, 0)[3], rest[3])


def test_rows_drop_on_their_own():
    (tree, *_), _ = stacked(lambda: jpeft.bottleneck(PARAMS, width=3, stochastic_depth=0.5, targets="dense"))
    ids = jnp.zeros((64, 3), jnp.int32)
    found = run(jpeft.stack([tree]), np.zeros(64, int), ids, rngs=jax.random.key(3)) - run(PARAMS, None, ids)
    out = np.all(found == 0, axis=(1, 2))
    assert 16 < out.sum() < 48
    np.testing.assert_array_equal(out, np.any(found == 0, axis=(1, 2)))


def test_nothing_drops_in_frozen_stacks():
    trees, _ = stacked(lambda: jpeft.lora(PARAMS, rank=2, dropout=0.5, targets="dense/kernel"))
    tree = jpeft.stack(trees, freeze=True)
    np.testing.assert_array_equal(run(tree, 0, rngs=jax.random.key(0)), run(tree, 0))
