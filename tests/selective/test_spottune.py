"""Blocks and their tuned copies: every example chooses."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import waves
from streams import BATCH, BLOCKS, FROZEN, LOGITS, TUNED, X, block, check_trained, plain, stack, trained

import jpeft
from jpeft.selective._spottune import straight_through
from jpeft.testing import shaken


def sure(choice):
    """Logits that leave no doubt."""
    return jnp.broadcast_to(jnp.where(jnp.arange(2) == choice, 1e4, 0.0), LOGITS.shape)


@pytest.mark.parametrize("key", [None, jax.random.key(9)])
def test_one_choice_is_the_base_the_other_full_fine_tuning(key):
    """Outputs, and the gradients of the tuned copy."""
    run = lambda tuned, choice: jpeft.spottune(block, FROZEN, tuned, X, sure(choice), key=key)
    for choice, params in enumerate((FROZEN, TUNED)):
        np.testing.assert_array_equal(run(TUNED, choice), plain(params))
    grads = [jax.grad(lambda t, n=n: waves(run(t, n)))(TUNED) for n in range(2)]
    assert not any(x.any() for x in jax.tree.leaves(grads[0]))
    chex.assert_trees_all_close(grads[1], jax.grad(lambda t: waves(plain(t)))(TUNED), rtol=1e-5, atol=1e-7)


def test_every_example_goes_its_own_way():
    choices = np.asarray(LOGITS[..., 1] > LOGITS[..., 0])
    assert len(np.unique(choices, axis=0)) > 1
    each = [plain([(FROZEN, TUNED)[int(c)][n] for n, c in enumerate(row)], X[i]) for i, row in enumerate(choices)]
    np.testing.assert_allclose(jpeft.spottune(block, FROZEN, TUNED, X, LOGITS), jnp.stack(each), rtol=1e-5, atol=1e-6)


def test_at_the_start_no_choice_matters():
    for logits in (LOGITS, sure(0), sure(1)):
        y = jpeft.spottune(block, FROZEN, FROZEN, X, logits, key=jax.random.key(1))
        np.testing.assert_array_equal(y, plain(FROZEN))


def test_a_choice_has_the_gradient_of_its_probability():
    """Of the relaxed choice, where the output is that of the hard one."""
    temperature = 3.0

    def by_hand(logits):
        """Gradients are by the soft gates, values and all else by the hard ones, written out."""
        x = X
        for n in range(BLOCKS):
            soft = jax.nn.sigmoid((logits[:, n, 1] - logits[:, n, 0]) / temperature)
            hard = jnp.where(LOGITS[:, n, 1] > LOGITS[:, n, 0], 1.0, 0.0)
            y, other = block(FROZEN[n], x), block(TUNED[n], x)
            chosen = jnp.where(hard[:, None, None] == 1, other, y)
            x = chosen + (soft - jax.lax.stop_gradient(soft))[:, None, None] * (other - y)
        return waves(x)

    run = lambda logits: waves(jpeft.spottune(block, FROZEN, TUNED, X, logits, temperature=temperature))
    found, want = jax.grad(run)(LOGITS), jax.grad(by_hand)(LOGITS)
    assert np.abs(want).min() > 0
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-7)


def test_straight_through_is_hard_exactly():
    soft = jax.random.uniform(jax.random.key(0), (1000,))
    hard = soft > 0.3
    assert set(np.unique(straight_through(hard, soft))) == {0.0, 1.0}
    np.testing.assert_array_equal(jax.grad(lambda x: straight_through(hard, x).sum())(soft), jnp.ones(1000))


def gates(logits, **options):
    """The choices themselves: of a block that returns its parameter, 0 or 1."""
    run = lambda params, x: jnp.full_like(x, params)
    ends = (jnp.zeros(logits.shape[1]), jnp.ones(logits.shape[1]))
    return jpeft.spottune(run, *map(list, ends), jnp.zeros(logits.shape[0]), logits, **options)


@pytest.mark.parametrize("temperature", [0.1, 5.0, 100.0])
def test_noise_chooses_with_the_probabilities_of_the_logits(temperature):
    """Whatever the temperature; the standard deviation of the mean is 0.004."""
    logits = jnp.broadcast_to(jnp.array([-0.5, 2.0]), (4000, 1, 2))
    share = np.mean(gates(logits, key=jax.random.key(3), temperature=temperature))
    assert abs(share - jax.nn.sigmoid(2.5)) < 0.02
    np.testing.assert_array_equal(gates(logits, temperature=temperature), np.ones(4000))


def test_limits_of_the_temperature():
    """Cold, a choice that is made has no gradient; hot, all have p (1 - p) / temperature with p = 1/2."""
    slope = lambda temperature: jax.grad(lambda z: gates(z, temperature=temperature).sum())(LOGITS[:, :1])
    np.testing.assert_allclose(slope(1e-3), 0, atol=1e-6)
    np.testing.assert_allclose(slope(1e4)[..., 1], 0.25 / 1e4, rtol=1e-3)


@pytest.mark.parametrize("key", [None, jax.random.key(9)])
def test_stacked_blocks(key):
    """Values and gradients, of the copy and the logits, are those of blocks one by one."""
    one = lambda tuned, z: waves(jpeft.spottune(block, FROZEN, tuned, X, z, key=key))
    all_ = lambda tuned, z: waves(jpeft.spottune(block, stack(FROZEN), tuned, X, z, key=key, scan=True))
    (y, (by_one, of_logits)) = jax.value_and_grad(one, (0, 1))(TUNED, LOGITS)
    (z, (stacked, of_stacked)) = jax.value_and_grad(all_, (0, 1))(stack(TUNED), LOGITS)
    chex.assert_trees_all_close((z, stacked, of_stacked), (y, stack(by_one), of_logits), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("scan", [False, True])
def test_the_copy_may_have_nodes(scan):
    """Through `apply` of the whole, and merged, it is the same; with one list it may be through `apply` of a block."""
    frozen = stack(FROZEN) if scan else FROZEN
    base = {"copy": stack(TUNED)} if scan else {"copy": dict(enumerate(TUNED))}
    letters = {".*kernel": "sio" if scan else "io"}
    tuned = shaken(jpeft.lora(base, rank=2, targets=letters), jax.random.key(7), 0.3)

    def run(params, x, block=block):
        copy = params["copy"] if scan else list(params["copy"].values())
        return jpeft.spottune(block, frozen, copy, x, LOGITS, scan=scan)

    want = run(jpeft.merge(tuned), X)
    np.testing.assert_allclose(jpeft.apply(run, tuned, X), want, rtol=1e-4, atol=1e-5)
    assert np.abs(want - run(base, X)).max() > 0.01
    if not scan:
        inner = lambda params, x: jpeft.apply(block, params, x)
        np.testing.assert_allclose(run(tuned, X, inner), want, rtol=1e-4, atol=1e-5)


def test_dtype_of_the_blocks_stays():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (FROZEN, TUNED))
    assert jpeft.spottune(block, *half, X.astype(jnp.bfloat16), LOGITS).dtype == jnp.bfloat16


def test_training():
    net = jpeft.SpotTunePolicy(BLOCKS, width=5)
    policy = net.init(jax.random.key(0), X)["params"]

    def forward(copies, policy, x, key):
        return jpeft.spottune(block, *copies, x, net.apply({"params": policy}, x), key=key, scan=True)

    check_trained(*trained(forward, policy))


def test_the_policy_sees_means():
    """Of all axes between the first and the last."""
    net = jpeft.SpotTunePolicy(BLOCKS, width=5)
    image = jax.random.normal(jax.random.key(0), (BATCH, 2, 3, 8))
    policy = net.init(jax.random.key(1), image)
    logits = net.apply(policy, image)
    assert logits.shape == (BATCH, BLOCKS, 2)
    np.testing.assert_allclose(net.apply(policy, image.mean((1, 2))), logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scan", [False, True])
def test_refuses(scan):
    of = stack if scan else list
    with pytest.raises(ValueError, match=r"\(6, 8\): it should be \(batch, blocks, 2\)"):
        jpeft.spottune(block, of(FROZEN), of(TUNED), X, LOGITS.reshape(BATCH, -1), scan=scan)
    with pytest.raises(ValueError, match=r"\{'frozen': 4, 'tuned': 4, 'logits': 3\}"):
        jpeft.spottune(block, of(FROZEN), of(TUNED), X, LOGITS[:, 1:], scan=scan)
