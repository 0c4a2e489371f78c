"""Trees tuned on one base, the changes that are in them, and sums of these that NumPy makes."""

import jax
import jax.numpy as jnp
import numpy as np

import jpeft
from jpeft._kernel import fold
from jpeft.testing import shaken


AXES = {"dense/kernel": "io", "heads/kernel": "ioo", "layers/kernel": "sio", "conv/kernel": "iiio"}
SHAPES = {"dense/kernel": (12, 10), "heads/kernel": (6, 2, 4), "layers/kernel": (3, 7, 8), "conv/kernel": (3, 2, 2, 9)}


def base(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    drawn = {path: jax.random.normal(k, shape, dtype) for k, (path, shape) in zip(keys, SHAPES.items(), strict=True)}
    params = {path.partition("/")[0]: {"kernel": x} for path, x in drawn.items()}
    params["dense"]["bias"] = jnp.ones(10, dtype)
    return params


BASE = base()


def tuned(method, seed, on=BASE, size=0.3, targets=AXES, **options):
    """The tree that a method makes of a base, as it may be after training."""
    start = method(on, targets=targets, **options)
    trainable, frozen = jpeft.partition(start)
    return jpeft.combine(shaken(trainable, jax.random.key(seed), size), frozen)


def loras():
    """Adapters of different ranks, scales and targets, one of them on a part of the kernels."""
    return [
        tuned(jpeft.lora, 1, rank=2, alpha=6),
        tuned(jpeft.lora, 2, rank=3, alpha=5, rslora=True),
        tuned(jpeft.lora, 3, targets={p: AXES[p] for p in ("dense/kernel", "layers/kernel")}, rank=1),
    ]


def changes(tree):
    """What a tree changes, by path: matrices `(stack..., in, out)`, by merging."""
    merged, plain = jpeft.merge(tree), jpeft.merge(jpeft.strip(tree))
    of = lambda params, path: np.asarray(fold(params[path.partition("/")[0]]["kernel"], AXES[path]), np.float64)
    return {path: of(merged, path) - of(plain, path) for path in AXES}


def weighted(trees, weights):
    """The sum of the trees' changes, by path."""
    found = [changes(tree) for tree in trees]
    return {path: sum(w * of[path] for w, of in zip(weights, found, strict=True)) for path in AXES}


def off(found, wanted):
    """The largest relative error of any path, in Frobenius norms."""
    return max(np.linalg.norm(found[path] - x) / max(np.linalg.norm(x), 1e-12) for path, x in wanted.items())
