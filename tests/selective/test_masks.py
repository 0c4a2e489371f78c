"""Masks have exactly as many entries as was asked, and those that theory and brute force pick."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

import jpeft
from jpeft.testing import subject


def count(mask):
    return sum(int(x.sum()) for x in jax.tree.leaves(mask))


@pytest.mark.parametrize("density", [0.005, 0.1, 0.333, 0.5, 1.0])
@pytest.mark.parametrize("ties", [False, True])
def test_exactly_k_of_all(density, ties):
    scores = {"a": normal(0, 20, 7), "b": {"c": normal(1, 60), "none": None}}
    if ties:
        scores = jax.tree.map(jnp.round, scores)
    mask = jpeft.mask_of(scores, density=density)
    assert count(mask) == int(density * 200)
    assert mask["b"]["none"] is None and mask["a"].dtype == bool
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    inside, outside = flat(scores)[flat(mask)], flat(scores)[~flat(mask)]
    assert density == 1 or inside.min() >= outside.max()


def test_the_share_is_meant_as_it_is_written():
    """0.29 * 100 is 28.999999999999996."""
    for share in range(1, 100):
        assert count(jpeft.mask_of({"a": jnp.arange(100.0)}, density=share / 100)) == share


def test_of_equal_scores_the_first_win():
    mask = jpeft.mask_of({"a": jnp.array([1.0, 2, 1, 1]), "b": jnp.array([1.0, 3])}, density=0.5)
    np.testing.assert_array_equal(mask["a"], [True, True, False, False])
    np.testing.assert_array_equal(mask["b"], [False, True])


def test_minus_infinity_is_never_chosen():
    mask = jpeft.mask_of({"a": jnp.array([-jnp.inf, 2, -3, -jnp.inf])}, density=0.75)
    np.testing.assert_array_equal(mask["a"], [False, True, True, False])


def test_each_parameter_and_each_layer_of_a_stack_by_itself():
    scores = {"large": 10 + normal(0, 8, 5), "small": normal(1, 30)}
    assert {k: int(x.sum()) for k, x in jpeft.mask_of(scores, density=0.4).items()} == {"large": 28, "small": 0}
    each = jpeft.mask_of(scores, density=0.4, scope="each")
    assert {k: int(x.sum()) for k, x in each.items()} == {"large": 16, "small": 12}

    layers = subject("decoder", scan=True)
    w = layers.params["layers"]["mlp"]["up"]["kernel"] * jnp.array([1.0, 5.0])[:, None, None]
    params = {"layers": {"mlp": {"up": {"kernel": w}}}}
    mask = jpeft.magnitude_mask(params, density=0.1, scope="each", sites=layers.sites)["layers"]["mlp"]["up"]["kernel"]
    for n in range(2):
        np.testing.assert_array_equal(mask[n], jpeft.mask_of({"w": jnp.abs(w[n])}, density=0.1)["w"])
    of_all = jpeft.magnitude_mask(params, density=0.1)["layers"]["mlp"]["up"]["kernel"]
    assert of_all[1].sum() > 2 * of_all[0].sum() and of_all.sum() == 102


def test_random_and_magnitude():
    params = {"up": {"kernel": normal(0, 6, 9), "bias": normal(1, 9)}, "lm_head": {"kernel": normal(2, 9, 4)}}
    found = [jpeft.random_mask(params, density=0.5, key=jax.random.key(n)) for n in range(200)]
    assert {count(mask) for mask in found} == {31} and found[0]["lm_head"]["kernel"] is None
    share = np.mean([mask["up"]["kernel"] for mask in found], axis=0)
    assert share.min() > 0.3 and share.max() < 0.7
    sizes = jpeft.magnitude_mask(params, density=0.5, targets="up/kernel")
    assert sizes["up"]["bias"] is None
    w = np.abs(params["up"]["kernel"])
    np.testing.assert_array_equal(sizes["up"]["kernel"], w >= np.sort(w.ravel())[-27])


def test_magnitude_of_what_nodes_make():
    params = {"w": normal(0, 6, 9)}
    tuned = jpeft.lora(params, rank=2, targets="w")
    tuned = {"w": tuned["w"].replace(b=jnp.zeros((2, 9)).at[0, 4].set(100.0))}
    mask = jpeft.magnitude_mask(tuned, density=6 / 54, targets="w")
    np.testing.assert_array_equal(np.argwhere(mask["w"])[:, 1], [4] * 6)


def logistic(params, batch):
    """The loss of logistic regression, a mean over examples."""
    logits = batch["x"] @ params["w"]
    return jnp.mean(jax.nn.softplus(logits) - batch["y"] * logits)


def examples(n=24, width=10):
    x = normal(0, n, width) * jnp.exp(normal(1, width))[None]
    return {"x": x, "y": (normal(2, n) > 0).astype(jnp.float32)}


def batches(data, size):
    return [jax.tree.map(lambda x, at=at: x[at : at + size], data) for at in range(0, len(data["y"]), size)]


def test_fish_is_the_closed_form_of_logistic_regression():
    """F_i = mean x_i^2 (p - y)^2, and in expectation over labels mean x_i^2 p (1 - p)."""
    params, data = {"w": normal(3, 10)}, examples()
    p = jax.nn.sigmoid(data["x"] @ params["w"])
    both = lambda params, batch: jax.nn.log_sigmoid(jnp.stack([-1.0, 1.0]) * (batch["x"][0] @ params["w"]))
    for loss, expected, weight in ((logistic, False, (p - data["y"]) ** 2), (both, True, p * (1 - p))):
        score = jnp.mean(data["x"] ** 2 * weight[:, None], axis=0)
        mask = jpeft.fish_mask(loss, params, batches(data, 6), density=0.4, expected=expected, targets="w")
        np.testing.assert_array_equal(mask["w"], jpeft.mask_of({"w": score}, density=0.4)["w"])


def test_masks_do_not_depend_on_the_order_of_examples_or_for_fish_on_batches():
    params, data = {"w": normal(3, 10)}, examples()
    mixed = jax.tree.map(lambda x: x[jax.random.permutation(jax.random.key(5), 24)], data)
    how = {"density": 0.5, "targets": "w"}
    fish = lambda data, size: jpeft.fish_mask(logistic, params, batches(data, size), **how)["w"]
    np.testing.assert_array_equal(fish(data, 24), fish(mixed, 24))
    np.testing.assert_array_equal(fish(data, 24), fish(mixed, 8))
    second = lambda data, size: jpeft.second_order_mask(logistic, params, batches(data, size), **how)["w"]
    np.testing.assert_array_equal(second(data, 24), second(mixed, 4))


def quadratic(h, start, best):
    """A loss with a diagonal Hessian, in two parameters; an entry is best at `best`."""
    return lambda params, batch: jnp.sum(0.5 * h * (jnp.concatenate([params["a"], params["b"]]) - best) ** 2)


def least(h, start, best, mask):
    """The least loss with the entries of `mask` free."""
    return np.sum((0.5 * h * (start - best) ** 2)[~mask])


@pytest.mark.parametrize("curved", [False, True])
@pytest.mark.parametrize("k", [1, 4, 7])
def test_second_order_is_the_best_of_all_masks(k, curved):
    size = 11
    h = np.exp(np.asarray(normal(0, size))) if curved else np.full(size, 1.7, np.float32)
    start, best = np.asarray(normal(1, size)), np.asarray(normal(2, size))
    params = {"a": jnp.asarray(start[:4]), "b": jnp.asarray(start[4:])}
    mask = jpeft.second_order_mask(
        quadratic(h, start, best),
        params,
        [jnp.zeros(1)],
        density=(k + 0.5) / size,
        curvature={"a": h[:4], "b": h[4:]} if curved else None,
        targets=".*",
    )
    found = np.concatenate([mask["a"], mask["b"]])
    assert found.sum() == k
    every = (np.isin(np.arange(size), at) for at in itertools.combinations(range(size), k))
    assert least(h, start, best, found) <= min(least(h, start, best, m) for m in every) * (1 + 1e-6)


def test_sums_of_gradients_and_of_squares_differ():
    """The gradient of the first entry turns between batches, and sums to nothing."""
    loss = lambda params, batch: jnp.sum(params["w"] * batch[0])
    params, data = {"w": jnp.ones(2)}, [jnp.array([[3.0, 1.0]]), jnp.array([[-3.0, 1.0]])]
    how = {"density": 0.5, "targets": "w"}
    np.testing.assert_array_equal(jpeft.second_order_mask(loss, params, data, **how)["w"], [False, True])
    np.testing.assert_array_equal(jpeft.second_order_mask(loss, params, data, squared=True, **how)["w"], [True, False])


def test_a_curvature_of_zero_where_there_is_no_gradient():
    loss = lambda params, batch: jnp.sum(params["w"] * batch[0])
    params, data = {"w": jnp.ones(3)}, [jnp.array([[0.0, 2.0, 3.0]])]
    how = {"density": 0.4, "targets": "w", "curvature": {"w": jnp.array([0.0, 1.0, 9.0])}}
    np.testing.assert_array_equal(jpeft.second_order_mask(loss, params, data, **how)["w"], [False, True, False])


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ({"a": jnp.ones(4), "b": jnp.array([jnp.nan])}, {"density": 0.5}, "not a number.*: b"),
        ({"a": jnp.ones(4)}, {"density": 0.0}, r"in \(0, 1\], not 0.0"),
        ({"a": jnp.ones(4)}, {"density": 1.5}, r"in \(0, 1\], not 1.5"),
        ({"a": jnp.ones(4)}, {"density": 0.2}, "0.2 of 4 entries is none"),
        ({"a": jnp.ones(4)}, {"density": 0.5, "scope": "layer"}, "`scope` is 'layer': one of all, each"),
        ({"a": None}, {"density": 0.5}, "no parameter"),
    ],
)
def test_refuses(scores, options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.mask_of(scores, **options)


@pytest.mark.parametrize("make", [jpeft.random_mask, jpeft.magnitude_mask])
def test_letters_tell_what_is_ranked_apart(make):
    params = {"layers": {"kernel": normal(0, 3, 8, 4) * jnp.array([1.0, 10, 100])[:, None, None]}}
    mask = make(params, density=0.25, scope="each", targets={".*": "sio"})["layers"]["kernel"]
    np.testing.assert_array_equal(mask.sum((1, 2)), [8, 8, 8])


@pytest.mark.parametrize("make", [jpeft.fish_mask, jpeft.second_order_mask])
def test_letters_tell_what_is_ranked_apart_by_gradients(make):
    scale = jnp.array([1.0, 10, 100]).reshape(1, 3, 1, 1)
    loss = lambda params, x: jnp.sum(params["layers"]["kernel"] * x * scale)
    batches, params = [normal(1, 1, 3, 8, 4)], {"layers": {"kernel": jnp.zeros((1, 3, 8, 4))}}
    mask = make(loss, params, batches, density=0.25, scope="each", targets={".*": "ssio"})["layers"]["kernel"]
    np.testing.assert_array_equal(mask.sum((0, 2, 3)), [8, 8, 8])


def test_scores_in_boxes_make_a_mask():
    scores = {"kernel": nn.Partitioned(normal(0, 4, 8), names=(None, "model"))}
    mask = jpeft.mask_of(scores, density=0.25)["kernel"]
    np.testing.assert_array_equal(mask, jpeft.mask_of({"kernel": scores["kernel"].value}, density=0.25)["kernel"])
