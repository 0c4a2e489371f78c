"""Steps of GaLore, Fira and APOLLO in numpy, on torch's weights `(out, in)`, in the order of the authors' code."""

import numpy as np


def norm(x, axis=None):
    return np.sqrt(np.sum(np.square(x), axis=axis))


class Adam:
    """Its updates without the learning rate."""

    def __init__(self, b1=0.9, b2=0.999, eps=1e-8):
        self.b1, self.b2, self.eps, self.t, self.m, self.v = b1, b2, eps, 0, 0.0, 0.0

    def __call__(self, g):
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g * g
        return self.m / (1 - self.b1**self.t) / (np.sqrt(self.v / (1 - self.b2**self.t)) + self.eps)


class Projector:
    """From the right where there are at least as many rows as columns, from the left otherwise.

    The sign of a singular vector is free: `like` are matrices `(side, rank)` whose columns have the signs to take.
    """

    def __init__(self, rank, every, like):
        self.rank, self.every, self.like, self.t, self.matrix = rank, every, like, 0, None

    def project(self, g):
        self.right = g.shape[0] >= g.shape[1]
        if self.t % self.every == 0:
            u, _, v = np.linalg.svd(g, full_matrices=False)
            vectors = v[: self.rank].T if self.right else u[:, : self.rank]
            vectors = vectors * np.sign(np.sum(vectors * self.like[self.t], axis=0))
            self.matrix = vectors.T if self.right else vectors
        self.t += 1
        return g @ self.matrix.T if self.right else self.matrix.T @ g

    def back(self, r):
        return r @ self.matrix if self.right else self.matrix @ r


class Limiter:
    def __init__(self, limit=1.01):
        self.limit, self.last = limit, None

    def __call__(self, x):
        size = norm(x)
        factor = 1.0 if self.last is None else max(size / (self.last + 1e-8), self.limit) / self.limit
        self.last = size / factor
        return x / factor


def galore(gradients, like, *, rank, every, scale):
    """The updates for a sequence of gradients."""
    projector, adam = Projector(rank, every, like), Adam()
    return [scale * projector.back(adam(projector.project(g))) for g in gradients]


def fira(gradients, like, *, rank, every, scale, scale_residual=False):
    projector, adam, limited = Projector(rank, every, like), Adam(), Limiter()
    for g in gradients:
        r = projector.project(g)
        u = adam(r)
        axis = 0 if u.shape[0] < u.shape[1] else 1
        ratio = np.expand_dims(norm(u, axis) / (norm(r, axis) + 1e-8), axis)
        rest = g - projector.back(r) * (scale if scale_residual else 1)
        yield scale * projector.back(u) + limited(rest * ratio)


def apollo(gradients, projections, *, scale, per="channel"):
    """With the projections `(rank, in)` or `(out, rank)` of every step."""
    adam, limited = Adam(), Limiter()
    for g, p in zip(gradients, projections, strict=True):
        r = g @ p.T if g.shape[0] >= g.shape[1] else p.T @ g
        u = adam(r)
        axis = None if per == "tensor" else 0 if u.shape[0] < u.shape[1] else 1
        ratio = norm(u, axis) / (norm(r, axis) + 1e-8)
        yield limited(g * (ratio if axis is None else np.expand_dims(ratio, axis))) * np.sqrt(scale)
