"""The subspace of SAID: its projections as matrices and on average, and what moves with v and lambda."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from scipy.linalg import hadamard as matrix

import jpeft
from jpeft.reparam._fastfood import PROJECTIONS, dense, fastfood, hadamard


def close(found, want, tolerance=1e-5):
    np.testing.assert_allclose(found, want, rtol=0, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("size", [1, 2, 32, 128, 2048])
def test_hadamard(size):
    x = normal(0, size)
    close(hadamard(x), matrix(size) @ np.asarray(x, np.float64))
    close(hadamard(hadamard(x)), size * x)


@pytest.mark.parametrize(("dimension", "size"), [(5, 64), (64, 64), (7, 33), (40, 6), (1, 1)])
def test_fastfood_by_its_matrices(dimension, size):
    """Also where there are more dimensions than the parameter has entries."""
    n = 1 if size == 1 else 64
    key, v = jax.random.key(3), normal(1, dimension)
    signs, order, gains = jax.random.split(key, 3)
    b, g = np.diag(jax.random.rademacher(signs, (n,))), np.diag(jax.random.normal(gains, (n,)))
    pi, h = np.eye(n)[jax.random.permutation(order, n)], matrix(n)
    p = (h @ g @ pi @ h @ b)[:size, :dimension] / np.sqrt(size * np.sum(g**2))
    close(fastfood(key, v, size), p @ np.asarray(v))
    close(jax.vmap(lambda v: fastfood(key, v, size), out_axes=1)(jnp.eye(dimension)), p)  # it is linear
    close(jax.grad(lambda v: jnp.sum(normal(2, size) * fastfood(key, v, size)))(v), normal(2, size) @ p)


@pytest.mark.parametrize("project", [fastfood, dense])
@pytest.mark.parametrize(("dimension", "size"), [(20, 48), (200, 30)])
def test_squares_are_kept_on_average(project, dimension, size):
    v = normal(0, dimension)
    square = jax.vmap(lambda key: jnp.sum(project(key, v, size) ** 2))(jax.random.split(jax.random.key(1), 2000))
    np.testing.assert_allclose(jnp.mean(square), jnp.sum(v**2), rtol=0.05)


PARAMS = {"dense": {"kernel": normal(0, 6, 4), "bias": normal(1, 4)}, "norm": {"scale": normal(2, 6)}}


def moved(params, **options):
    """Adapted, with a random v and lambda."""
    tuned = jpeft.said(params, **options)
    trainable, frozen = jpeft.partition(tuned)
    keys = iter(jax.random.split(jax.random.key(5), 20))
    return jpeft.combine(jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), trainable), frozen)


def test_start():
    tuned = jpeft.said(PARAMS, dimension=23)
    jax.tree.map(np.testing.assert_array_equal, jpeft.merge(tuned), PARAMS)
    assert tuned["jpeft_shared"]["said_v"].array.shape == (20,)
    assert jpeft.said(PARAMS, dimension=23, structure_aware=False)["jpeft_shared"]["said_v"].array.shape == (23,)
    assert jpeft.summary(tuned).trainable == 23


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_change(projection):
    """Each by its own projection, from its own key."""
    tuned = moved(PARAMS, dimension=12, projection=projection)
    merged, v = jpeft.merge(tuned), tuned["jpeft_shared"]["said_v"].array
    for path in (("dense", "kernel"), ("dense", "bias"), ("norm", "scale")):
        node, plain, before = (tree[path[0]][path[1]] for tree in (tuned, merged, PARAMS))
        p = PROJECTIONS[projection](jax.random.wrap_key_data(node.seed), v, before.size)
        close(plain, before + node.factor * p.reshape(before.shape))
    assert len({tuple(np.asarray(x)) for x in jax.tree.leaves(jpeft.partition(tuned)[1]) if x.dtype == jnp.uint32}) == 3


def test_identity_as_projection_is_fine_tuning(monkeypatch):
    """DID with P = I is `delta`: the same gradient, and the same change."""
    monkeypatch.setitem(PROJECTIONS, "identity", lambda key, v, size: v)
    kernel, x = PARAMS["dense"]["kernel"], normal(3, 5, 6)
    loss = lambda trainable, frozen: jnp.sum(jnp.sin(x @ jpeft.merge(jpeft.combine(trainable, frozen))["kernel"]))
    said = jpeft.said({"kernel": kernel}, dimension=24, structure_aware=False, projection="identity")
    full = jpeft.delta({"kernel": kernel})
    found, want = (jax.grad(loss)(*jpeft.partition(tree)) for tree in (said, full))
    close(found["jpeft_shared"]["said_v"].array.reshape(6, 4), want["kernel"].values)


def test_layers_of_a_stack_differ():
    """In their projections, and each has a lambda."""
    stack = {"kernel": jnp.zeros((3, 6, 4)), "bias": jnp.zeros((3, 4))}
    tuned = moved(stack, dimension=20, targets={"kernel": "sio", "bias": "so"})
    assert tuned["kernel"].factor.shape == tuned["bias"].factor.shape == (3,)
    change = jpeft.merge(tuned)["kernel"] / tuned["kernel"].factor[:, None, None]
    assert np.abs(np.corrcoef(change.reshape(3, -1))[np.triu_indices(3, 1)]).max() < 0.9


def test_no_projection_is_kept():
    """Of a kernel of a million entries a few words."""
    tuned = jax.eval_shape(jpeft.said(dimension=100), {"kernel": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)})
    row = next(row for row in jpeft.summary(tuned).rows if row.path == "kernel")
    assert row.trainable_bytes == 4 and row.frozen_bytes == 4 * 1024**2 + 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projection": "sparse"}, "one of fastfood, dense"),
        ({"dimension": 3}, "dimension of 3, 3 are the parameters' own factors"),
        ({"dimension": 0, "structure_aware": False}, "dimension of 0"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.said(PARAMS, **options)


DRAWN = {
    "fastfood": [1.2316835, 6.868721, -2.4294624, -2.1002846, 12.956487, -2.6778922],
    "dense": [-7.364849, -0.8200477, -8.007862, -0.7789344, -0.84813875, 5.295402],
}


@pytest.mark.parametrize("partitionable", [True, False])
@pytest.mark.parametrize("projection", DRAWN)
def test_seed_means_the_same_everywhere(projection, partitionable):
    """Else a checkpoint, which keeps the seed alone, would be another model where JAX is set, or made, otherwise."""
    seed = jnp.array([1, 2], jnp.uint32)
    node = jpeft.SAID(v=jnp.arange(1.0, 6.0), factor=jnp.float32(2), seed=seed, shape=(3, 2), projection=projection)
    with jax.threefry_partitionable(partitionable):
        close(node.change.ravel(), np.array(DRAWN[projection]))
