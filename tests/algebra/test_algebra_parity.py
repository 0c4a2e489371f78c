"""Against what Hugging Face's PEFT makes of the same adapters, where that is right, and where it is not."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from test_pruned import elected

import jpeft
from jpeft import algebra


FILE = np.load(Path(__file__).parents[1] / "fixtures/algebra/peft.npz")
WEIGHTS = {"first": 0.7, "second": -1.3, "third": 0.4}
DENSITY, FULL = 0.4, 5
AXES = {"linear": "io", "embedding": "io", "conv": "iiio"}
SHAPES = {"linear": (9, 5), "embedding": (11, 5), "conv": (3, 2, 3, 5)}


def of_torch(layer, x):
    """An array of a layer's weight as ours."""
    return {"linear": lambda x: x.T, "embedding": lambda x: x, "conv": lambda x: x.transpose(2, 3, 1, 0)}[layer](x)


def adapter(name):
    """The tree of one of PEFT's adapters."""
    params = {layer: jnp.ones(shape) for layer, shape in SHAPES.items()}
    for layer, base in params.items():
        if f"{layer}/{name}/a" in FILE:
            a, b, scale = (FILE[f"{layer}/{name}/{part}"] for part in ("a", "b", "scale"))
            down = of_torch(layer, a).reshape(-1, a.shape[0]) if layer != "embedding" else a.T
            b = jnp.asarray(b.reshape(b.shape[:2]).T)
            params[layer] = jpeft.LoRA(base=base, axes=AXES[layer], a=jnp.asarray(down), b=b, scale=float(scale))
    return params


TREES = [adapter(name) for name in WEIGHTS]


def change(tree, layer):
    """What a tree changes, in float64: its base is ones."""
    return np.asarray(jpeft.merge(tree)[layer], np.float64) - 1


def check(params, case, tolerance=5e-6):
    for layer in AXES:
        wanted = of_torch(layer, FILE[f"{layer}/{case}"])
        np.testing.assert_allclose(change(params, layer), wanted, atol=tolerance * np.abs(wanted).max(), err_msg=layer)


def test_cat():
    check(algebra.cat(TREES, weights=list(WEIGHTS.values())), "cat")


def test_svd():
    found = algebra.svd(TREES, weights=list(WEIGHTS.values()), rank=3)
    assert set(found.ranks.values()) == {3}
    check(found.params, "svd")


@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_ties(sign):
    options = {"density": DENSITY, "weights": list(WEIGHTS.values()), "sign": sign}
    check(algebra.ties(TREES, **options).params, f"ties_{sign}")
    check(algebra.ties(TREES, **options, rank=FULL).params, f"ties_{sign}")


def test_magnitude_prune():
    found = algebra.magnitude_prune(TREES, density=DENSITY, weights=list(WEIGHTS.values()), rank=FULL)
    check(found.params, "magnitude_prune")


@pytest.mark.parametrize("case", ["dare_linear", "dare_ties"])
def test_dare_by_what_was_left(case):
    """PEFT's draws are its own: what is made of them is what `test_pruned` has ours compared with."""
    for layer in AXES:
        names = [name for name in WEIGHTS if f"{layer}/{case}/{name}" in FILE]
        left, weights = [FILE[f"{layer}/{case}/{name}"] for name in names], [WEIGHTS[name] for name in names]
        wanted = elected(left, weights, "total") if case == "dare_ties" else np.tensordot(weights, left, 1)
        np.testing.assert_allclose(FILE[f"{layer}/{case}"], wanted, atol=5e-6 * np.abs(wanted).max())
        for name, x in zip(names, left, strict=True):
            whole = change(TREES[list(WEIGHTS).index(name)], layer)
            kept = of_torch(layer, x)
            np.testing.assert_allclose(kept, np.where(kept == 0, 0, whole / DENSITY), rtol=1e-5, atol=1e-5)


def test_an_adapter_by_the_root_of_its_rank_may_be_first():
    """PEFT scales the result by it once more: by the root of the rank of all three, 2 + 3 + 2."""
    found = algebra.cat([TREES[1], TREES[0], TREES[2]], weights=[-1.3, 0.7, 0.4])
    check(found, "cat")
    scaled = FILE["linear/cat_rslora_first"].T / 7**0.5
    np.testing.assert_allclose(change(found, "linear"), scaled, atol=5e-6 * np.abs(scaled).max())


def test_the_sum_of_factors_is_no_sum():
    """PEFT's `linear` adds up the factors: A_1 meets B_2. That of changes is another."""
    trees, weights = [TREES[0], TREES[2]], [WEIGHTS["first"], WEIGHTS["third"]]
    exact = change(algebra.linear(trees, weights=weights), "linear")
    off = np.linalg.norm(of_torch("linear", FILE["linear/linear"]) - exact) / np.linalg.norm(exact)
    assert 0.9 < off < 1.3
    wanted = sum(w * change(tree, "linear") for w, tree in zip(weights, trees, strict=True))
    np.testing.assert_allclose(exact, wanted, atol=2e-5)
