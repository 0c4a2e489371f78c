"""Rotations of pairs of outputs: against Hugging Face's PEFT, by a dense matrix, and where they are orthogonal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_layers import check_gradients, check_merged, check_outputs, layer, of_case

import jpeft
from jpeft.testing import subject


FIELDS = {"theta": "road_theta", "alpha": "road_alpha"}


def close(found, want, tolerance=1e-5):
    np.testing.assert_allclose(found, want, rtol=0, atol=tolerance * np.abs(want).max())


def node(variant, *, outputs=12, group=6):
    start = jpeft.road({"kernel": jnp.ones((3, outputs))}, targets="", variant=variant, group=group)["road"]
    of = lambda n: jax.random.normal(jax.random.key(n), start.theta.shape)
    return start.replace(theta=of(1), alpha=of(2))


@pytest.mark.parametrize(
    ("case", "variant", "group"), [("road_1", 1, 4), ("road_2", 2, 8), ("road_4", 4, 4), ("road_bare", 4, 6)]
)
def test_peft(case, variant, group):
    """With a bias, which is rotated too, and without."""
    arrays = of_case("structured/peft.npz", case)
    model, params, _, x, y = layer(arrays)
    model = model.clone(use_bias="bias" in params)
    params = jpeft.road(params, targets="", variant=variant, group=group)
    start = params["road"]
    filled = lambda kind: {f: jnp.asarray(arrays[f"{kind}/{n}"].reshape(start.theta.shape)) for f, n in FIELDS.items()}
    params["road"] = start.replace(**filled("adapter"))
    check_outputs(model, params, x, y)
    check_merged(model, params, x, y)
    want = filled("gradient")
    if variant == 1:  # the loss is |y|^2 / 2, which no rotation changes
        del want["theta"]
    check_gradients(model, params, "road", x, want)


def dense(road):
    """R, with z' = z R, entry by entry."""
    groups, half = road.theta.shape[0], road.theta.shape[-1]
    theta, alpha = (np.broadcast_to(p, (groups, 2, 2, half)) for p in (road.theta, road.alpha))
    r = np.zeros((2 * groups * half, 2 * groups * half))
    for g, i in np.ndindex(groups, half):
        first = 2 * half * g + i
        for side, (here, other, sign) in enumerate([(first, first + half, -1), (first + half, first, 1)]):
            r[here, here] = alpha[g, 0, side, i] * np.cos(theta[g, 0, side, i])
            r[other, here] = sign * alpha[g, 1, side, i] * np.sin(theta[g, 1, side, i])
    return r


@pytest.mark.parametrize("variant", [1, 2, 4])
def test_by_a_dense_matrix(variant):
    road, z = node(variant), jax.random.normal(jax.random.key(3), (2, 5, 12))
    close(road.output(z), z @ dense(road))


def test_one_angle_is_a_rotation():
    """With scales of one, of the first variant alone."""
    r = [dense(road.replace(alpha=jnp.ones_like(road.alpha))) for road in (node(1), node(2))]
    close(r[0] @ r[0].T, np.eye(12))
    assert np.abs(r[1] @ r[1].T - np.eye(12)).max() > 0.1


def test_several_output_axes():
    """A module of outputs (heads, 4) has one rotation for all heads, which a kernel of 8 outputs takes in as two."""
    road = node(2, outputs=4, group=4)
    w, b = jax.random.normal(jax.random.key(4), (5, 8)), jax.random.normal(jax.random.key(5), (8,))
    x = jax.random.normal(jax.random.key(6), (7, 5))
    kernel, bias = road.merged(w, b)
    z = (x @ w + jnp.broadcast_to(b, (7, 8))).reshape(7, 2, 4)
    close(x @ kernel + jnp.broadcast_to(bias, (7, 8)), road.output(z).reshape(7, 8))


def test_bfloat16_is_turned_in_float32():
    road, z = node(1), jnp.ones((1, 12), jnp.bfloat16)
    y = road.output(z)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, road.output(z.astype(jnp.float32)).astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": 3}, "one of 1, 2, 4"),
        ({"group": 5}, "even group"),
        ({"group": 64}, "divides a module's 8 outputs, not 64"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.road(subject("decoder").params, targets=".*/(key|value)", **options)
