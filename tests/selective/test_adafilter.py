"""Blocks and their tuned copies: every example chooses, channel by channel."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import waves
from streams import BATCH, BLOCKS, FROZEN, LOGITS, TUNED, WIDTH, X, block, check_trained, plain, stack, trained

import jpeft
from jpeft.testing import shaken


def always(channels):
    """A gate with logits that are the same for all: `(channels,)`, or one for each example."""
    return lambda state, means: (state, jnp.broadcast_to(channels, means.shape))


@pytest.mark.parametrize("scan", [False, True])
def test_filters_of_one_choice(scan):
    """The base, and ordinary fine-tuning, with its gradient."""
    of = stack if scan else list
    run = lambda tuned, logit: jpeft.adafilter(block, of(FROZEN), tuned, X, always(logit), (), scan=scan)
    for logit, params in ((-9.0, FROZEN), (9.0, TUNED)):
        np.testing.assert_allclose(run(of(TUNED), logit), plain(params), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(run(of(FROZEN), jnp.cos(jnp.arange(8.0))[None]), plain(FROZEN), rtol=1e-6, atol=1e-6)
    grads = jax.grad(lambda t: waves(run(t, 9.0)))(of(TUNED))
    chex.assert_trees_all_close(grads, of(jax.grad(lambda t: waves(plain(t)))(TUNED)), rtol=1e-4, atol=1e-6)


def test_filters_that_are_alike_in_all_channels_are_spottune():
    """Values, and the gradients of a gate's logits: as those of SpotTune's with temperature 1."""

    def channels(logits):
        def gate(n, means):
            return n + 1, jnp.broadcast_to((logits[:, n, 1] - logits[:, n, 0])[:, None], means.shape)

        return jpeft.adafilter(block, FROZEN, TUNED, X, gate, 0)

    examples = lambda logits: jpeft.spottune(block, FROZEN, TUNED, X, logits, temperature=1.0)
    found, want = (jax.value_and_grad(lambda z, f=f: waves(f(z)))(LOGITS) for f in (channels, examples))
    chex.assert_trees_all_close(found, want, rtol=1e-5, atol=1e-7)


def test_a_filter_takes_each_channel_from_its_stream():
    logits = jnp.where(jnp.arange(WIDTH) % 3 == 0, 1.0, -1.0)[None]
    y = jpeft.adafilter(block, FROZEN[:1], TUNED[:1], X, always(logits), ())
    want = np.where(np.arange(WIDTH) % 3 == 0, block(TUNED[0], X), block(FROZEN[0], X))
    np.testing.assert_array_equal(y, want)


def test_the_gate_remembers():
    """One LSTM for all blocks, which sees the means of what each is called with: by hand."""
    net = jpeft.AdaFilterGate(WIDTH, width=5)
    params = shaken(net.init(jax.random.key(0), net.start(BATCH), X[:, 0])["params"], jax.random.key(1), 0.5)
    gate = lambda state, means: net.apply({"params": params}, state, means)
    y = jpeft.adafilter(block, FROZEN, TUNED, X, gate, net.start(BATCH))
    c, h, x, cell = np.zeros((BATCH, 5)), np.zeros((BATCH, 5)), np.asarray(X), jax.tree.map(np.asarray, params["cell"])
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    for n in range(BLOCKS):
        i, f, g, o = (
            x.mean(1) @ cell[f"i{name}"]["kernel"] + h @ cell[f"h{name}"]["kernel"] + cell[f"h{name}"]["bias"][None]
            for name in "ifgo"
        )
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        logits = h @ np.asarray(params["logits"]["kernel"]) + np.asarray(params["logits"]["bias"])[None]
        streams = [block(params[n], jnp.asarray(x, jnp.float32)) for params in (TUNED, FROZEN)]
        x = np.where(logits[:, None] > 0, *streams)
    np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-4)


def test_each_stream_has_statistics_of_its_own():
    """Of batch norm: they are in its tree."""
    norm = nn.BatchNorm(use_running_average=True)
    one = norm.init(jax.random.key(0), X)
    streams = [[shaken(one, jax.random.key(n), 0.1)] for n in (1, 2)]
    y = jpeft.adafilter(norm.apply, *streams, X, always(jnp.where(jnp.arange(WIDTH) < 3, 1.0, -1.0)[None]), ())
    frozen, tuned = (norm.apply(variables, X) for (variables,) in streams)
    np.testing.assert_array_equal(y, jnp.concatenate([tuned[..., :3], frozen[..., 3:]], axis=-1))


def test_dtype_of_the_blocks_stays():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (FROZEN, TUNED))
    assert jpeft.adafilter(block, *half, X.astype(jnp.bfloat16), always(0.0), ()).dtype == jnp.bfloat16


def test_training():
    net = jpeft.AdaFilterGate(WIDTH, width=5)
    params = net.init(jax.random.key(0), net.start(BATCH), X[:, 0])["params"]

    def forward(copies, params, x, key):
        gate = lambda state, means: net.apply({"params": params}, state, means)
        return jpeft.adafilter(block, *copies, x, gate, net.start(BATCH), scan=True)

    check_trained(*trained(forward, params))


@pytest.mark.parametrize("scan", [False, True])
def test_refuses(scan):
    of = stack if scan else list
    with pytest.raises(ValueError, match=r"\{'frozen': 4, 'tuned': 2\}"):
        jpeft.adafilter(block, of(FROZEN), of(TUNED[:2]), X, always(0.0), (), scan=scan)
