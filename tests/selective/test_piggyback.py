"""Masks of frozen kernels: their gradient is that of a relaxed mask, they are binary, and one bit an entry on disk."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.testing import shaken


KERNEL = jax.random.normal(jax.random.key(0), (9, 5)).at[2].set(0.0)
X, Y = jax.random.normal(jax.random.key(1), (7, 9)), jax.random.normal(jax.random.key(2), (7, 5))
linear = lambda params, x: x @ params["kernel"]


def trained(params):
    """With scores around both thresholds."""
    trainable, frozen = jpeft.partition(params)
    return jpeft.combine(shaken(trainable, jax.random.key(4)), frozen)


def gradient(params, loss):
    trainable, frozen = jpeft.partition(params)
    return jax.grad(lambda t: loss(jpeft.apply(linear, jpeft.combine(t, frozen), X)))(trainable)


@pytest.mark.parametrize("negative", [None, 0.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_starts_as_the_base_bit_by_bit(negative, dtype):
    params = {"kernel": KERNEL.astype(dtype)}
    tuned = jpeft.piggyback(params, negative=negative)
    np.testing.assert_array_equal(jpeft.merge(tuned)["kernel"], params["kernel"])
    x = X.astype(dtype)
    np.testing.assert_array_equal(jpeft.apply(linear, tuned, x), linear(params, x))
    assert tuned["kernel"].scores.dtype == jnp.float32
    np.testing.assert_array_equal(tuned["kernel"].scores, jnp.full((9, 5), 1e-2))


@pytest.mark.parametrize("negative", [None, 0.0])
def test_gradient_is_the_slope_of_the_relaxed_mask(negative):
    """Central differences, in float64, of the loss as a function of a real mask at the binary one."""
    params = trained(jpeft.piggyback({"kernel": KERNEL}, negative=negative))
    found = gradient(params, lambda y: jnp.sum(jnp.cos(y) * Y))["kernel"].scores
    w, x, y = (np.asarray(a, np.float64) for a in (KERNEL, X, Y))
    scores = np.asarray(params["kernel"].scores)
    mask = (scores > 5e-3).astype(np.float64) - (0 if negative is None else scores < negative)
    loss = lambda mask: np.sum(np.cos(x @ (w * mask)) * y)
    for place in np.ndindex(*w.shape):
        step = np.zeros(w.shape)
        step[place] = 1e-5
        slope = (loss(mask + step) - loss(mask - step)) / 2e-5
        np.testing.assert_allclose(found[place], slope, rtol=1e-4, atol=1e-5)
    assert not found[2].any()  # where W is zero
    assert np.abs(np.delete(found, 2, axis=0)).min() > 0


@pytest.mark.parametrize(("negative", "signs"), [(None, {0, 1}), (0.0, {-1, 0, 1}), (-0.05, {-1, 0, 1})])
def test_mask_takes_its_values_alone(negative, signs):
    params = trained(jpeft.piggyback({"kernel": jnp.ones((40, 30))}, negative=negative))
    found, scores = jpeft.merge(params)["kernel"], params["kernel"].scores
    assert set(np.unique(found)) == signs
    np.testing.assert_array_equal(found == 1, scores > 5e-3)
    np.testing.assert_array_equal(found == -1, scores < (-jnp.inf if negative is None else negative))


@pytest.mark.parametrize("negative", [None, 0.0])
@pytest.mark.parametrize("below", [lambda params, axes: params, lambda params, axes: jpeft.nf4(params, targets=axes)])
def test_hardened_is_the_same_model(negative, below):
    """Of layers, with sizes that fill no byte, over and under other nodes."""
    axes = {"kernel": "sio"}
    base = below({"kernel": jax.random.normal(jax.random.key(5), (3, 9, 5))}, axes)
    make = jpeft.chain(jpeft.piggyback(negative=negative, targets=axes), jpeft.lora(rank=2, targets=axes))
    params = trained(make(base))
    hard = jpeft.harden(params)
    found = hard["kernel"].base
    assert isinstance(found, jpeft.BitMask)
    assert found.bits.dtype == jnp.uint8 and found.bits.shape == (3, 1 if negative is None else 2, 6)
    np.testing.assert_array_equal(jpeft.merge(hard)["kernel"], jpeft.merge(params)["kernel"])
    assert not jax.tree.leaves(jpeft.partition(hard)[0]["kernel"].base)


def test_two_masks_are_hardened_both():
    params = trained(jpeft.piggyback(jpeft.piggyback({"kernel": KERNEL})))
    hard = jpeft.harden(params)["kernel"]
    assert isinstance(hard, jpeft.BitMask) and isinstance(hard.base, jpeft.BitMask)
    np.testing.assert_array_equal(hard.value(), params["kernel"].value())


@pytest.mark.parametrize(("negative", "bits"), [(None, 1), (0.0, 2)])
def test_bits_on_disk(tmp_path, negative, bits):
    """Beside what any checkpoint takes, which a larger kernel does not change: the bytes of random masks."""

    def size(width):
        params = {"kernel": jax.random.normal(jax.random.key(0), (width, width)), "head": jnp.zeros((4, 2))}
        tuned = jpeft.chain(jpeft.piggyback(negative=negative), jpeft.unfreeze(targets="head"))(params)
        hard = jpeft.harden(trained(tuned))
        path = tmp_path / str(width)
        size = jpeft.save(path, hard)
        back = jpeft.restore(path, params)
        np.testing.assert_array_equal(jpeft.merge(back)["kernel"], jpeft.merge(hard)["kernel"])
        return size

    large, small = size(1024), size(512)
    assert (large - small) / (1024**2 - 512**2) == pytest.approx(bits / 8, rel=0.01)
    assert large < 1024**2 * bits / 8 + 20_000


def test_learns_which_entries_to_keep():
    kept = jax.random.bernoulli(jax.random.key(3), 0.5, (16, 12))
    w, x = (jax.random.normal(jax.random.key(n), s) for n, s in ((0, (16, 12)), (1, (64, 16))))
    params = jpeft.piggyback({"kernel": w})
    trainable, frozen = jpeft.partition(params)
    tx = optax.adam(1e-3)
    y = x @ (w * kept.astype(w.dtype))

    @jax.jit
    def step(trainable, state):
        loss = lambda t: jnp.mean(jnp.square(jpeft.apply(linear, jpeft.combine(t, frozen), x) - y))
        with jax.numpy_dtype_promotion("standard"):  # Optax counts steps in integers
            updates, state = tx.update(jax.grad(loss)(trainable), state)
        return optax.apply_updates(trainable, updates), state

    state = tx.init(trainable)
    for _ in range(100):
        trainable, state = step(trainable, state)
    found = jpeft.harden(jpeft.combine(trainable, frozen))
    right = (jpeft.merge(found)["kernel"] != 0) == kept
    assert right.mean() > 0.97  # entries near zero hardly tell


def test_weight_decay_masks_everything():
    trainable, frozen = jpeft.partition(jpeft.piggyback({"kernel": jnp.ones((4, 4))}))
    tx = optax.add_decayed_weights(-0.1)
    for _ in range(7):  # 0.9^7 < 1 / 2
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, trainable), tx.init(trainable), trainable)
        trainable = optax.apply_updates(trainable, updates)
    assert not jpeft.merge(jpeft.combine(trainable, frozen))["kernel"].any()


@pytest.mark.parametrize("options", [{"threshold": 1e-2}, {"start": 0.0}, {"negative": 6e-3}])
def test_refuses(options):
    with pytest.raises(ValueError, match="`negative <= threshold < start` must hold"):
        jpeft.piggyback({"kernel": KERNEL}, **options)


def test_refuses_to_harden_nothing():
    with pytest.raises(ValueError, match="no Piggyback node"):
        jpeft.harden(jpeft.lora({"kernel": KERNEL}))
