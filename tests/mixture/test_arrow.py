"""Arrow against the formula, written by hand with a singular value decomposition, and against single LoRAs."""

import jax
import numpy as np
import pytest
from test_moe_lora import DENSE, PARAMS, X, close

import jpeft
from jpeft._tree import map_nodes
from jpeft.testing import LAYERS, subject


def tree(n, base=PARAMS, **options):
    """A LoRA of its own."""
    made = jpeft.lora(base, key=jax.random.key(n), **{"rank": 2, "alpha": 3} | options)
    trainable, frozen = jpeft.partition(made)
    noisy = lambda x: x + 0.5 * jax.random.normal(jax.random.key(100 + n), x.shape)
    return jpeft.combine(jax.tree.map(noisy, trainable), frozen)


TREES = [tree(0), tree(1, rank=4, alpha=8), tree(2), tree(3, rank=1, alpha=1)]


def by_formula(trees, x, top, temperature, general=()):
    """Token by token."""
    factors = lambda t: (np.asarray(t["kernel"].a), np.asarray(t["kernel"].b) * t["kernel"].scale)
    means = [np.mean([factors(t)[n] for t in general], 0) if general else 0.0 for n in (0, 1)]
    experts = [tuple(f - m for f, m in zip(factors(t), means, strict=True)) for t in trees]
    prototypes = np.stack([np.linalg.svd(a @ b)[0][:, 0] for a, b in experts])
    rows = np.asarray(x).reshape(-1, x.shape[-1])
    y = rows @ np.asarray(PARAMS["kernel"]) + np.asarray(PARAMS["bias"])
    for n, row in enumerate(rows):
        scores = np.abs(prototypes @ row)
        best = np.argsort(-scores)[:top]
        gates = np.exp(scores[best] / temperature)
        for g, e in zip(gates / gates.sum(), best, strict=True):
            y[n] += g * row @ experts[e][0] @ experts[e][1]
    return y.reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize(("top", "temperature"), [(1, 1.0), (2, 0.3), (3, 1.0), (4, 2.0)])
def test_formula(top, temperature):
    """Of LoRAs with different ranks and scales."""
    params = jpeft.arrow(TREES, top=top, temperature=temperature)
    assert params["arrow"].a.shape == (4, 6, 4) and not jax.tree.leaves(jpeft.partition(params)[0])
    found = jax.jit(lambda p: jpeft.apply(DENSE, {"params": p}, X))(params)
    close(found, by_formula(TREES, X, top, temperature), 1e-5)


def test_general_knowledge_is_taken_away():
    tasks, general = [tree(n) for n in range(3)], [tree(n) for n in (7, 8)]
    found = jpeft.apply(DENSE, {"params": jpeft.arrow(tasks, top=2, general=general)}, X)
    close(found, by_formula(tasks, X, 2, 1.0, general), 1e-5)
    assert np.abs(found - by_formula(tasks, X, 2, 1.0)).max() > 0.1


def test_one_tree_is_itself():
    close(jpeft.apply(DENSE, {"params": jpeft.arrow(TREES[:1], top=1)}, X), jpeft.apply(DENSE, {"params": TREES[0]}, X))


def test_the_coldest_router_takes_the_nearest():
    params = jpeft.arrow(TREES, top=4, temperature=1e-4)
    found, nearest = jpeft.apply(DENSE, {"params": params}, X), np.argmax(np.abs(X @ params["arrow"].prototypes), -1)
    assert len(np.unique(nearest)) > 1
    for e, one in enumerate(TREES):
        close(found[nearest == e], jpeft.apply(DENSE, {"params": one}, X)[nearest == e])


@pytest.mark.slow
def test_scanned_layers_are_unrolled_ones(tmp_path):
    """On a quantized base, and when restored."""
    plain, scanned = subject(), subject(scan=True, base="nf4")
    targets = ".*/(query|down)/kernel"
    trees = [tree(n, scanned.params, targets=targets, sites=scanned.sites) for n in range(3)]
    params = jpeft.arrow(trees, top=2, temperature=0.5)
    found = scanned.run(params)
    assert all(np.abs(found - scanned.run(t)).max() > 0.01 for t in trees)
    jpeft.save(tmp_path / "arrow", params)
    np.testing.assert_array_equal(scanned.run(jpeft.restore(tmp_path / "arrow", scanned.params)), found)

    def unrolled(t):
        whole = map_nodes(jpeft.NF4.value, t, jpeft.NF4)
        lone = lambda x: x.replace(axes="io") if isinstance(x, jpeft.LoRA) else x
        one = lambda n: jax.tree.map(lambda x: x[n], whole["layers"])
        layer = lambda n: jax.tree.map(lone, one(n), is_leaf=lambda x: isinstance(x, jpeft.LoRA))
        rest = {name: x for name, x in whole.items() if name != "layers"}
        return rest | {f"layers_{n}": layer(n) for n in range(LAYERS)}

    close(found, plain.run(jpeft.arrow([unrolled(t) for t in trees], top=2, temperature=0.5)), 1e-4)


def test_faults():
    for wrong in ({"top": 0}, {"top": 5}, {"top": 1, "temperature": 0.0}):
        with pytest.raises(ValueError, match=f"Of 4 trees .*top={wrong['top']}"):
            jpeft.arrow(TREES, **wrong)
    with pytest.raises(ValueError, match=r"kernel.*trees\[2\].*base"):
        jpeft.arrow([*TREES[:2], tree(2, {**PARAMS, "kernel": PARAMS["kernel"] + 1})], top=1)
    with pytest.raises(ValueError, match=r"trees\[1\].*DoRA"):
        jpeft.arrow([TREES[0], jpeft.dora(PARAMS)], top=1)
    with pytest.raises(ValueError, match=r"trees\[1\].*on another node"):
        jpeft.arrow([TREES[0], tree(1, TREES[0])], top=1)
    with pytest.raises(ValueError, match="Arrow, which acts on activations"):
        jpeft.merge(jpeft.arrow(TREES))


def test_all_paths_of_other_targets_are_told():
    base = {"one": PARAMS, "two": PARAMS, "three": PARAMS}
    trees = [tree(0, base), tree(1, base, targets="(one|three)/kernel"), tree(2, base, targets="three/kernel")]
    with pytest.raises(ValueError, match=r"one/kernel: none in trees \[2\]\n  two/kernel: none in trees \[1, 2\]\n"):
        jpeft.arrow(trees, top=1)
