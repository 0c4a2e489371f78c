"""Some outputs of feed-forward kernels train: as the split layout of the paper has it, and with its gradients alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft._kernel import fold
from jpeft.testing import shaken


SIZES = {"up": (6, 10), "down": (10, 6)}
PARTS = [(name, part) for name in SIZES for part in ("kernel", "bias")]
X, Y = (jax.random.normal(jax.random.key(n), (12, 6)) for n in (1, 2))


def affine(x, own):
    return x @ own["kernel"] + jnp.broadcast_to(own["bias"], (len(x), len(own["bias"])))


def mlp(params, x):
    """Two layers with biases, and a frozen scale."""
    layers = params["mlp"]
    return affine(jnp.tanh(affine(x, layers["up"])), layers["down"]) * params["scale"]


def base(dtype=jnp.float32):
    layer = lambda shape: {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[1])}
    params = {"mlp": {name: layer(shape) for name, shape in SIZES.items()}, "scale": jnp.ones(())}
    return jax.tree.map(lambda x: x.astype(dtype), shaken(params, jax.random.key(3), 0.5))


def primed(params=None, seed=4):
    return shaken(base() if params is None else params, jax.random.key(seed))


def loss(params):
    return jnp.mean(jnp.square(jpeft.apply(mlp, params, X) - Y))


def descend(params, steps=5, mask=None):
    """Steps of SGD, with the gradients of masked entries alone."""
    trainable, frozen = jpeft.partition(params)
    tx = optax.sgd(0.1)
    for _ in range(steps):
        grads = jax.grad(lambda t: loss(jpeft.combine(t, frozen)))(trainable)
        if mask is not None:
            grads = jax.tree.map(lambda g, m: jnp.where(m, g, 0.0), grads, mask)
        trainable = optax.apply_updates(trainable, tx.update(grads, tx.init(trainable))[0])
    return jpeft.merge(jpeft.combine(trainable, frozen))


def close(found, expected):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, expected)


@pytest.mark.parametrize("rewind", [False, True])
def test_outputs_that_have_changed_most(rewind):
    """The largest sums of changes, biases among them, by NumPy; others are what they were."""
    before, after = base(), primed()
    params = jpeft.far(before, primed=after, retention=0.4, rewind=rewind)
    found = jpeft.merge(params)
    arrays = lambda tree, name: [np.asarray(tree["mlp"][name][part]) for part in ("kernel", "bias")]
    for name, (_, features) in SIZES.items():
        was, now, got = (arrays(tree, name) for tree in (before, before if rewind else after, found))
        (w1, b1), (w0, b0) = arrays(after, name), was
        importance = np.abs(w1 - w0).sum(0) + np.abs(b1 - b0)
        chosen = np.argsort(-importance)[: round(0.4 * features)]
        others = np.setdiff1d(np.arange(features), chosen)
        for start, end, x in zip(was, now, got, strict=True):
            np.testing.assert_allclose(x[..., chosen], end[..., chosen], rtol=1e-6, atol=1e-7)
            np.testing.assert_array_equal(x[..., others], start[..., others])
        for part in ("kernel", "bias"):
            np.testing.assert_array_equal(params["mlp"][name][part].indices, np.sort(chosen))


def test_is_the_split_layout():
    """`concat(x W_t + b_t, x W_f + b_f)[..., perm^-1]`, whose trainable half has the gradients of the columns."""
    params = jpeft.far(base(), primed=primed(), retention=0.4)
    halves = jax.tree.map(lambda node: node.split(), params["mlp"], is_leaf=lambda x: isinstance(x, jpeft.FAR))
    trainable = {name: {part: x[0] for part, x in own.items()} for name, own in halves.items()}

    def split(trainable, x):
        def layer(name, x):
            (_, w, order), (_, b, _) = halves[name]["kernel"], halves[name]["bias"]
            own = trainable[name]
            halved = [x @ own["kernel"] + own["bias"].repeat(len(x), 0), x @ w + b.repeat(len(x), 0)]
            return jnp.concatenate(halved, axis=-1)[..., order]

        return layer("down", jnp.tanh(layer("up", x))) * params["scale"]

    np.testing.assert_allclose(split(trainable, X), jpeft.apply(mlp, params, X), rtol=1e-5, atol=1e-6)
    expected = jax.grad(lambda t: jnp.mean(jnp.square(split(t, X) - Y)))(trainable)
    own, frozen = jpeft.partition(params)
    found = jax.grad(lambda t: loss(jpeft.combine(t, frozen)))(own)
    for name, part in PARTS:
        np.testing.assert_allclose(found["mlp"][name][part].columns, expected[name][part], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("axes", "retention"), [("io", 0.01), ("soi", 0.5), ("sio", 0.5), ("ioo", 0.5), ("ioo", 1.0)]
)
def test_permuted_back_is_the_parameter(axes, retention):
    """Bit for bit, of whatever shape and in half precision; those that do not train are the base's."""
    w = jax.random.normal(jax.random.key(5), [3 if c == "s" else 4 + n for n, c in enumerate(axes)], jnp.bfloat16)
    params, targets = {"w": w}, {"w": axes}
    node = jpeft.far(params, primed=shaken(params, jax.random.key(6), 1.0), retention=retention, targets=targets)["w"]
    trains, frozen, order = node.split()
    count, (*stack, rows, outs) = node.indices.shape[-1], fold(w, axes).shape
    assert trains.shape == (*stack, rows, count) and frozen.shape == (*stack, rows, outs - count)
    back = np.take_along_axis(np.concatenate([trains, frozen], -1), np.asarray(order)[..., None, :], -1)
    np.testing.assert_array_equal(back, fold(node.value(), axes))
    others = np.take_along_axis(fold(np.asarray(w), axes), _others(node.indices, outs)[..., None, :], -1)
    np.testing.assert_array_equal(frozen, others)


def _others(indices, count):
    rows = [np.setdiff1d(np.arange(count), row) for row in np.asarray(indices).reshape(-1, indices.shape[-1])]
    return np.array(rows, int).reshape(*indices.shape[:-1], -1)


def test_gradients_are_columns_of_the_whole_ones():
    params = jpeft.far(base(), primed=primed(), retention=0.3)
    own, frozen = jpeft.partition(params)
    found = jax.grad(lambda t: loss(jpeft.combine(t, frozen)))(own)
    whole = jax.grad(loss)(jpeft.merge(params))
    for name in SIZES:
        node = params["mlp"][name]["kernel"]
        g = whole["mlp"][name]["kernel"][:, node.indices]
        np.testing.assert_allclose(found["mlp"][name]["kernel"].columns, g, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("retention", [1.0, 0.4])
def test_training_is_that_of_masked_gradients(retention):
    """Step for step with SGD; where all outputs train, of the whole block."""
    params = jpeft.far(base(), primed=primed(), retention=retention)
    whole = jpeft.unfreeze(jpeft.merge(params), targets="mlp/.*")
    mask, _ = jpeft.partition(whole)
    for name, part in PARTS:
        indices = params["mlp"][name][part].indices
        free = mask["mlp"][name][part]
        mask["mlp"][name][part] = free.replace(array=jnp.zeros(free.array.shape, bool).at[..., indices].set(True))
    if retention == 1:
        assert all(jnp.all(m) for m in jax.tree.leaves(mask))
    close(descend(params), descend(whole, mask=mask))


def test_priming_by_a_delta_over_bfloat16():
    """Changes that bfloat16 cannot hold are counted, and are where training starts."""
    before = base(jnp.bfloat16)
    trained = jpeft.delta(before)
    trained["mlp"]["up"]["kernel"] = trained["mlp"]["up"]["kernel"].replace(
        values=jnp.zeros((6, 10)).at[:, 7].set(1e-5).at[:, 2].set(-2e-5)
    )
    np.testing.assert_array_equal(jpeft.merge(trained)["mlp"]["up"]["kernel"], before["mlp"]["up"]["kernel"])
    node = jpeft.far(before, primed=trained, retention=0.2)["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(node.indices, [2, 7])
    np.testing.assert_allclose(node.columns[0], [-2e-5, 1e-5], rtol=1e-2)


@pytest.mark.parametrize("rewind", [False, True])
def test_layers_in_a_stack_each_have_their_own(rewind):
    layer = lambda seed: jax.tree.map(lambda x: x[None], primed(seed=seed)["mlp"])
    stack = lambda seeds: {"mlp": jax.tree.map(lambda *xs: jnp.concatenate(xs), *map(layer, seeds))}
    before, after = stack((5, 6, 7)), stack((8, 9, 10))
    targets = {"mlp/.*/kernel": "sio"}
    params = jpeft.far(before, primed=after, retention=0.4, rewind=rewind, targets=targets)
    for n in range(3):
        cut = lambda tree, n=n: jax.tree.map(lambda x: x[n], tree)
        one = jpeft.far(cut(before), primed=cut(after), retention=0.4, rewind=rewind)
        close(cut(jpeft.merge(params)), jpeft.merge(one))
        for name, part in PARTS:
            np.testing.assert_array_equal(params["mlp"][name][part].indices[n], one["mlp"][name][part].indices)


def test_stands_over_quantized_kernels():
    big = {"mlp": {"up": {"kernel": jax.random.normal(jax.random.key(0), (64, 64))}}}
    held = jpeft.nf4(big, targets=".*")
    trained = jpeft.delta(held)
    node = trained["mlp"]["up"]["kernel"]
    trained["mlp"]["up"]["kernel"] = node.replace(values=jnp.zeros((64, 64)).at[:, 5].set(0.1).at[:, 9].set(0.2))
    found = jpeft.far(held, primed=trained, retention=2 / 64)
    np.testing.assert_array_equal(found["mlp"]["up"]["kernel"].indices, [5, 9])
    close(jpeft.merge(found), jpeft.merge(trained))


def test_the_backward_pass_is_of_the_columns():
    """By XLA's count: for the kernel's gradient, `k` of `out` outputs, and none is computed of the others."""
    tokens, features, count = 256, 128, 16
    params = {"mlp": {"up": {"kernel": jnp.ones((features, features))}}}
    x = jnp.ones((tokens, features))
    run = lambda params, x: jpeft.apply(lambda params, x: x @ params["mlp"]["up"]["kernel"], params, x).sum()

    def flops(params):
        trainable, frozen = jpeft.partition(params)
        step = jax.jit(jax.value_and_grad(lambda t, f: run(jpeft.combine(t, f), x)))
        return step.lower(trainable, frozen).compile().cost_analysis()["flops"]

    product = 2 * tokens * features
    changed = jax.tree.map(lambda w: w + 1, params)
    found = flops(jpeft.far(params, primed=changed, retention=count / features))
    whole = flops(jpeft.unfreeze(params, targets=".*"))
    assert whole == pytest.approx(product * (features + features), rel=0.05)  # the product, and the kernel's gradient
    assert found == pytest.approx(product * (features + count + count), rel=0.05)  # forward, and backward, k columns


def test_usual_names():
    names = ["layers_0/mlp/up", "h/0/mlp/c_fc", "encoder/ffn/dense", "feed_forward_1/wo", "mlp/down"]
    others = ["layers_0/attn/out", "lm_head", "layers_0/attention/output/dense"]
    nested = lambda leaf: {name: {"kernel": leaf} for name in names + others}
    tree = jpeft.far(nested(jnp.ones((4, 4))), primed=nested(jnp.zeros((4, 4))), retention=0.5)
    assert {name for name, x in tree.items() if isinstance(x["kernel"], jpeft.FAR)} == set(names)


@pytest.mark.parametrize("retention", [0.0, 1.2])
def test_refuses_retentions(retention):
    with pytest.raises(ValueError, match=r"A retention is in \(0, 1\]"):
        jpeft.far(base(), primed=primed(), retention=retention)


def test_refuses_another_tree():
    other = primed()
    other["mlp"]["up"]["kernel"] = jnp.ones((2, 2))
    del other["mlp"]["down"]["bias"]
    with pytest.raises(ValueError, match=r"(?s)mlp/down/bias: missing.*mlp/up/kernel: \(2, 2\), and not \(6, 10\)"):
        jpeft.far(base(), primed=other)


def test_refuses_biases_whose_stack_is_not_told():
    params = {"mlp": {"up": {"kernel": jnp.ones((4, 6, 3)), "bias": jnp.ones((6, 3))}}}
    with pytest.raises(ValueError, match=r"Which axes of 'mlp/up/bias' are stacked\?"):
        jpeft.far(params, primed=params, targets={".*kernel": "ios"})
