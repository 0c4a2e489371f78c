"""A linear probe: logistic regression on frozen features, what fine-tuning has to beat."""

from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize


STRENGTHS = 10.0 ** np.arange(-4, 0.5, 0.5)


class Linear(NamedTuple):
    """`logits = features @ kernel + bias`: kernel (features, classes), bias (classes,), both float32."""

    kernel: np.ndarray
    bias: np.ndarray

    def accuracy(self, features: np.ndarray, labels: np.ndarray) -> float:
        """The share of rows whose label has the greatest logit."""
        return float(np.mean(np.argmax(features @ self.kernel + self.bias, axis=1) == labels))


def probe(features: np.ndarray, labels: np.ndarray, tuning: np.ndarray, classes: int) -> tuple[Linear, float]:
    """The best logistic regression that the training set alone leads to, and its L2 strength.

    The strength is that of the best accuracy on the rows in `tuning`, learned from the others; the regression is then
    learned from all.

    Args:
      features: (texts, features).
      labels: (texts,), integers below `classes`.
      tuning: (texts,), bool.
    """

    def score(strength: float) -> float:
        learned = logistic_regression(features[~tuning], labels[~tuning], classes, strength)
        return learned.accuracy(features[tuning], labels[tuning])

    strength = max(STRENGTHS, key=score) if tuning.any() else STRENGTHS[len(STRENGTHS) // 2]
    return logistic_regression(features, labels, classes, strength), float(strength)


def logistic_regression(features: np.ndarray, labels: np.ndarray, classes: int, strength: float) -> Linear:
    """The minimum of mean cross entropy + `strength` / 2 * ||kernel||^2, on features of mean 0 and variance 1."""
    mean, deviation = features.mean(axis=0), features.std(axis=0)
    deviation = np.where(deviation > 1e-6, deviation, 1.0)  # some features of some models are constant
    x = ((features - mean) / deviation).astype(np.float64)
    y = np.eye(classes)[labels]

    def loss_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        kernel, bias = np.split(flat.reshape(-1, classes), [-1])
        logits = x @ kernel + bias
        logits -= logits.max(axis=1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        error = (np.exp(log_p) - y) / len(x)
        gradient = np.concatenate([x.T @ error + strength * kernel, error.sum(axis=0, keepdims=True)])
        return -np.sum(log_p * y) / len(x) + strength / 2 * np.sum(kernel**2), gradient.ravel()

    start = np.zeros((x.shape[1] + 1) * classes)
    flat = minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B", options={"maxiter": 1000}).x
    kernel, bias = np.split(flat.reshape(-1, classes), [-1])
    kernel /= deviation[:, None]
    return Linear(kernel.astype(np.float32), (bias[0] - mean @ kernel).astype(np.float32))
