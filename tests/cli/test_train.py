import math
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft.cli._arguments import Arguments
from jpeft.cli._train import interruptions, learning_rate, optimizer


@pytest.fixture
def arguments():
    return Arguments(steps=20, warmup=0.25, learning_rate=2.0, weight_decay=0.1, clip=1.0)


SHAPES = [("linear", 2.0 * 5 / 15), ("cosine", 1.0 + math.cos(math.pi * 10 / 15))]


@pytest.mark.parametrize(("schedule", "middle"), SHAPES)
def test_learning_rate_rises_and_decays(arguments, schedule, middle):
    rate = learning_rate(Arguments(**vars(arguments) | {"schedule": schedule}))
    np.testing.assert_allclose([rate(n) for n in range(6)], [2.0 * n / 6 for n in (1, 2, 3, 4, 5, 6)], rtol=1e-6)
    np.testing.assert_allclose(rate(15), middle, rtol=1e-6)
    assert all(rate(n) > rate(n + 1) > 0 for n in range(5, 19))
    np.testing.assert_allclose(rate(20), 0, atol=1e-7)


def test_first_step_is_adams(arguments):
    """Adam's first update is the sign of the gradient; the decay adds 0.1 of matrices, and the clip changes neither."""
    tx = optimizer(arguments)
    params = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, 3.0)}
    gradients = jax.tree.map(lambda x: -100.0 * x, params)
    updates, _ = tx.update(gradients, tx.init(params), params)
    peak = 2.0 / 6
    np.testing.assert_allclose(updates["kernel"], peak * (1 - 0.1 * 3.0), rtol=1e-5)
    np.testing.assert_allclose(updates["bias"], peak, rtol=1e-5)


@pytest.fixture
def before():
    """Python's own handler, which a process that was started in the background does not have."""
    outer = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, outer)


def test_interruption_is_told_once_and_then_lets_go(before):
    with interruptions() as interrupted:
        assert not interrupted()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
