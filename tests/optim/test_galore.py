"""GaLore and what it shares with Fira and APOLLO: sides, states, and the steps of the authors' code."""

import authors_steps
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import normal

import jpeft
from jpeft.optim import apollo, fira, galore


SHAPES = {"wide": (4, 6), "tall": (6, 4), "square": (5, 5)}  # (in, out)


def gradients(shape, steps=5):
    return [normal(n, *shape) for n in range(steps)]


def steps(tx, grads, params=None):
    """The updates of a transform for a sequence of gradients, and the states after each."""
    params = jax.tree.map(jnp.zeros_like, grads[0]) if params is None else params
    state, found, states = tx.init(params), [], []
    update = jax.jit(tx.update)
    for g in grads:
        u, state = update(g, state, params)
        found.append(u)
        states.append(state)
    return found, states


def of_kernel(tx, grads):
    found, states = steps(tx, [{"kernel": g} for g in grads])
    return [u["kernel"] for u in found], states


def in_torch(grads):
    return [np.array(g.T, np.float64) for g in grads]


def projections(states):
    return [np.asarray(state[0].projections["kernel"]) for state in states]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_as_the_authors_step(shape):
    grads = gradients(shape)
    found, states = of_kernel(galore(1.0, rank=2, every=3), grads)
    expected = authors_steps.galore(in_torch(grads), projections(states), rank=2, every=3, scale=0.25)
    for u, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(u, -e.T, atol=1e-4)


@pytest.mark.parametrize(("shape", "side"), [((4, 6), 0), ((6, 4), 1), ((5, 5), 0)], ids=SHAPES)
def test_the_smaller_side_is_projected_on_orthonormal_columns(shape, side):
    (g,) = gradients(shape, 1)
    (u,), states = of_kernel(galore(1.0, rank=2, scale=1.0, inner=optax.identity()), [g])
    (p,) = projections(states)
    assert p.shape == (shape[side], 2)
    np.testing.assert_allclose(p.T @ p, np.eye(2), atol=1e-6)
    np.testing.assert_allclose(-u, p @ p.T @ g if side == 0 else g @ p @ p.T, atol=1e-5)
    left, values, right = np.linalg.svd(g)
    np.testing.assert_allclose(-u, left[:, :2] * values[:2] @ right[:2], atol=1e-5)  # the nearest of rank 2


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_at_full_rank_gradient_descent_is_scaled_alone(shape):
    grads = gradients(shape)
    found, _ = of_kernel(galore(1.0, rank=99, every=2, scale=0.5, inner=optax.trace(0.9)), grads[:2])
    expected, _ = of_kernel(optax.sgd(0.5, momentum=0.9), grads[:2])
    chex.assert_trees_all_close(found, expected, atol=1e-5)


def test_at_full_rank_adam_sees_rotated_gradients():
    grads = gradients((4, 6))
    rotation = np.linalg.svd(grads[0])[0]
    with jax.numpy_dtype_promotion("standard"):  # Optax counts steps in integers
        rotated, _ = of_kernel(optax.adam(1.0), [rotation.T @ g for g in grads])
    found, _ = of_kernel(galore(1.0, rank=4, scale=1.0), grads)
    chex.assert_trees_all_close(found, [rotation @ u for u in rotated], atol=1e-4)


def test_moments_stay_when_the_projection_changes():
    grads = gradients((4, 6), 2)
    _, states = of_kernel(galore(1.0, rank=2, every=1, inner=optax.trace(0.5)), grads)
    first, second = (p.T @ g for p, g in zip(projections(states), grads, strict=True))
    np.testing.assert_allclose(states[1][0].inner.trace["kernel"], 0.5 * first + second, atol=1e-5)


PARAMS = {
    "attention": {"kernel": normal(0, 6, 2, 4), "bias": normal(1, 2, 4)},
    "layers": {"kernel": normal(2, 3, 10, 4)},
    "embed": {"embedding": normal(3, 9, 6)},
    "lm_head": {"kernel": normal(4, 6, 9)},
}
TARGETS = {"attention/kernel": "ioo", "layers/kernel": "sio"}


@pytest.mark.parametrize(
    ("tx", "kept"),
    [
        (galore(0.1, rank=2, targets=TARGETS), 6 * 2 + 3 * 4 * 2),
        (fira(0.1, rank=2, targets=TARGETS), 6 * 2 + 3 * 4 * 2 + 1 + 3),  # a norm for each matrix
        (apollo(0.1, rank=2, targets=TARGETS), 1 + 3),
    ],
    ids=["galore", "fira", "apollo"],
)
def test_bytes_of_the_state(tx, kept):
    moments = 2 * 8 + 3 * 2 * 10  # (rank, larger side) of every matrix
    plain = 2 * 4 + 9 * 6 + 6 * 9
    counts = 2
    for tree in (PARAMS, jpeft.partition(jpeft.unfreeze(PARAMS, targets=".*"))[0]):
        found = jax.tree.leaves(jax.eval_shape(tx.init, tree))
        assert sum(x.size * x.dtype.itemsize for x in found) == 4 * (2 * (moments + plain) + kept + counts)


@pytest.mark.parametrize("make", [galore, fira, apollo])
def test_a_stack_is_its_matrices_and_a_kernel_of_many_axes_is_one(make):
    how = {"rank": 2, "every": 2, "inner": optax.scale_by_adam()}
    if make is not apollo:  # whose projections are drawn for each tree
        stacked = [{"kernel": normal(n, 3, 10, 4)} for n in range(3)]
        found, _ = steps(make(0.1, **how, targets={"kernel": "sio"}), stacked)
        for layer in range(3):
            alone, _ = of_kernel(make(0.1, **how), [g["kernel"][layer] for g in stacked])
            chex.assert_trees_all_close([u["kernel"][layer] for u in found], alone, atol=1e-5)
    heads = gradients((6, 2, 4), 3)
    found, _ = steps(make(0.1, **how, targets={"kernel": "ioo"}), [{"kernel": g} for g in heads])
    flat, _ = of_kernel(make(0.1, **how), [g.reshape(6, 8) for g in heads])
    chex.assert_trees_all_close([u["kernel"].reshape(6, 8) for u in found], flat, atol=1e-5)


@pytest.mark.parametrize("make", [galore, fira, apollo])
def test_what_is_no_target_has_the_inner_updates(make):
    grads = [jax.tree.map(lambda x, n=n: normal(n, *x.shape), PARAMS) for n in range(3)]
    found, _ = steps(make(0.1, rank=2, targets=TARGETS, weight_decay=0.5), grads, PARAMS)
    with jax.numpy_dtype_promotion("standard"):
        adamw, _ = steps(optax.adamw(0.1, weight_decay=0.5), grads, PARAMS)
    for path in (("attention", "bias"), ("embed", "embedding"), ("lm_head", "kernel")):
        pick = lambda u, path=path: u[path[0]][path[1]]
        chex.assert_trees_all_close([pick(u) for u in found], [pick(u) for u in adamw], atol=1e-6)


@pytest.mark.parametrize("make", [galore, fira, apollo])
def test_weight_decay_is_of_full_rank_and_beside_the_moments(make):
    grads = [{"kernel": g} for g in gradients((4, 6))]
    params = {"kernel": normal(9, 4, 6)}
    plain, first = steps(make(0.1, rank=2), grads, params)
    decayed, second = steps(make(0.1, rank=2, weight_decay=0.5), grads, params)
    chex.assert_trees_all_close(decayed, [{"kernel": u["kernel"] - 0.05 * params["kernel"]} for u in plain], atol=1e-6)
    chex.assert_trees_all_equal([s[0] for s in first], [s[0] for s in second])


@pytest.mark.parametrize("make", [galore, fira, apollo])
def test_what_cannot_be(make):
    with pytest.raises(ValueError, match="rank of at least 1, not 0"):
        make(0.1, rank=0)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        make(0.1, every=0)
    with pytest.raises(ValueError, match=r"attention/kernel: \(6, 2, 4\)"):
        make(0.1).init(PARAMS)
    with pytest.raises(ValueError, match="matches no parameter"):
        make(0.1).init({"bias": jnp.ones(3)})
