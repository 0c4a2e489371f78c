import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft.cli._probe import STRENGTHS, logistic_regression, probe


@pytest.fixture
def clusters():
    """120 points of 3 classes in 6 dimensions, of which one is constant and one is large."""
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=120)
    x = rng.normal(size=(120, 6)) + np.eye(3)[labels] @ rng.normal(size=(3, 6))
    x[:, 4], x[:, 5] = 7.0, 1000 * x[:, 5]
    return x.astype(np.float32), labels


@pytest.mark.parametrize("strength", [1e-3, 0.1])
def test_logistic_regression_is_at_the_minimum(clusters, strength):
    x, labels = clusters
    mean, deviation = x.mean(axis=0), np.where(x.std(axis=0) > 1e-6, x.std(axis=0), 1.0)
    kernel, bias = logistic_regression(x, labels, 3, strength)
    scaled = jnp.asarray((x - mean) / deviation)

    def loss(kernel, bias):
        logits = scaled @ kernel + jnp.broadcast_to(bias, (120, 3))
        entropy = -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1))
        return entropy + strength / 2 * jnp.sum(kernel**2)

    on_scaled = jnp.asarray(kernel * deviation[:, None]), jnp.asarray(bias + mean @ kernel)
    gradients = jax.grad(loss, argnums=(0, 1))(*on_scaled)
    assert max(float(jnp.abs(g).max()) for g in gradients) < 1e-4


def test_strength_is_the_best_on_the_tuning_rows(clusters):
    x, labels = clusters
    tuning = np.arange(120) % 4 == 0
    learned = [logistic_regression(x[~tuning], labels[~tuning], 3, strength) for strength in STRENGTHS]
    scores = [linear.accuracy(x[tuning], labels[tuning]) for linear in learned]
    linear, strength = probe(x, labels, tuning, 3)
    assert strength == STRENGTHS[np.argmax(scores)]
    np.testing.assert_array_equal(linear.kernel, logistic_regression(x, labels, 3, strength).kernel)


def test_accuracy_is_the_share_of_right_rows():
    linear = logistic_regression(np.float32([[-1], [-2], [1], [2]]), np.array([0, 0, 1, 1]), 2, 0.1)
    assert linear.accuracy(np.float32([[-3], [3], [3], [3]]), np.array([0, 1, 1, 0])) == 0.75
