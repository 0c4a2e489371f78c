"""Entries that train move to where gradients are large: what is kept is kept bit by bit, what is dropped is base."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.testing import shaken


KERNEL = jax.random.normal(jax.random.key(0), (3, 8, 6))  # three layers
TX = jpeft.optim.scale_by_aged_adam()
normal = lambda seed, shape: jax.random.normal(jax.random.key(seed), shape)


def single(**options):
    return jpeft.spiel({"kernel": KERNEL[0]}, **options)


def layers(**options):
    return jpeft.spiel({"kernel": KERNEL}, targets={"kernel": "sio"}, **options)


def trained(params, steps=3):
    """A tree and an optimizer's state, of which no entry is zero."""
    trainable, frozen = jpeft.partition(params)
    trainable, state = shaken(trainable, jax.random.key(1)), TX.init(trainable)
    for n in range(steps):
        _, state = TX.update(shaken(trainable, jax.random.key(n)), state)
    return jpeft.combine(trainable, frozen), state


def rows(node, *moments):
    """The arrays of every matrix: indices, values and what an optimizer remembers of them."""
    arrays = (node.indices, node.values, *(x["kernel"].values for x in moments))
    return zip(*(np.asarray(x).reshape(-1, x.shape[-1]) for x in arrays), strict=True)


@pytest.mark.parametrize("make", [single, layers])
def test_starts_at_random_entries(make):
    node = make(density=0.25, key=jax.random.key(5))["kernel"]
    found = [indices for indices, _ in rows(node)]
    assert all(np.unique(x).tolist() == x.tolist() and len(x) == 12 for x in found)
    assert all(x.min() >= 0 and x.max() < 48 for x in found)
    assert len({tuple(x) for x in found}) == len(found)
    assert not node.values.any() and node.indices.dtype == jnp.int32


@pytest.mark.parametrize("make", [single, layers])
@pytest.mark.parametrize("rate", [0.25, 0.0, 1.0])
def test_reselect_is_what_sorting_by_hand_says(make, rate):
    params, state = trained(make(density=0.25))
    scores = {"kernel": normal(7, params["kernel"].base.shape)}
    new, new_state = jax.jit(jpeft.optim.reselect)(params, state, scores, rate=rate)
    np.testing.assert_array_equal(new["kernel"].base, params["kernel"].base)
    olds = rows(params["kernel"], state.mu, state.nu, state.age)
    news = rows(new["kernel"], new_state.mu, new_state.nu, new_state.age)
    for old, found, score in zip(olds, news, np.abs(scores["kernel"]).reshape(-1, 48), strict=True):
        (held, value, *_), count = old, round(rate * 12)
        dropped = set(held[np.argsort(np.abs(value))[:count]].tolist())
        others = np.setdiff1d(np.arange(48), held)
        grown = others[np.argsort(-score[others])[:count]]
        assert set(found[0].tolist()) == set(held.tolist()) - dropped | set(grown.tolist())
        stays = ~np.isin(held, list(dropped))
        for was, now in zip(old, found, strict=True):
            np.testing.assert_array_equal(now[stays], was[stays])  # indices, value, both moments, age
        assert not any(now[~stays].any() for now in found[1:])
        assert all(was.all() for was in old[1:])  # there was something to forget


@pytest.mark.parametrize("make", [single, layers])
def test_dropped_entries_are_the_base_again(make):
    params, state = trained(make(density=0.25))
    new, _ = jpeft.optim.reselect(params, state, {"kernel": normal(7, params["kernel"].base.shape)}, rate=0.5)
    before, after = (np.asarray(jpeft.merge(x)["kernel"]).ravel() for x in (params, new))
    base = np.asarray(params["kernel"].base).ravel()
    back = (before != base) & (after == base)
    assert back.sum() == 6 * params["kernel"].values.size // 12
    np.testing.assert_array_equal(after[~back], before[~back])


def test_no_more_than_there_are_left_to_select():
    params, state = trained(single(density=0.75))
    new, _ = jpeft.optim.reselect(params, state, {"kernel": normal(7, (8, 6))}, rate=1.0)
    held, found = params["kernel"].indices, new["kernel"].indices
    assert len(np.unique(found)) == len(found) == 36
    np.testing.assert_array_equal(np.setdiff1d(np.arange(48), held), np.setdiff1d(found, held))


def test_lists_that_are_filled_up_stay_filled_up():
    mask = np.zeros((2, 4, 4), bool)
    mask[0, 0], mask[1] = True, True
    mask[1, 3, 3] = False
    params = jpeft.sparse({"kernel": KERNEL[:2, :4, :4]}, mask={"kernel": mask}, targets={"kernel": "sio"})
    params, state = trained(params)
    new, _ = jpeft.optim.reselect(params, state, {"kernel": normal(3, (2, 4, 4))}, rate=0.5)
    found = np.asarray(new["kernel"].indices)
    assert (found < 16).sum(1).tolist() == [4, 15]
    assert all(len(np.unique(x[x < 16])) == (x < 16).sum() for x in found)
    assert len(np.intersect1d(found[0], np.arange(4))) == 2


def test_compiles_once_for_a_schedule_of_rates():
    rates = optax.linear_schedule(0.2, 0.0, 40)
    traces = 0

    @jax.jit
    def run(params, state, step):
        nonlocal traces
        traces += 1
        return jpeft.optim.reselect(params, state, {"kernel": normal(7, (8, 6))}, rate=rates(step))

    params, state = trained(single(density=0.5))
    moved = []
    for step in (0, 20, 40):
        new, _ = run(params, state, jnp.int32(step))
        moved.append(int(np.sum(new["kernel"].indices != params["kernel"].indices)))
    assert traces == 1
    assert moved == [5, 2, 0]


def descend(params, tx, steps, x, y, then=lambda *state, step: state):
    """Train a linear map; `then` may change the tree and the optimizer's state after a step."""
    loss = lambda params: jnp.mean(jnp.square(jpeft.apply(lambda p, x: x @ p["kernel"], params, x) - y))

    @jax.jit
    def one(params, state):
        trainable, frozen = jpeft.partition(params)
        grads = jax.grad(lambda trainable: loss(jpeft.combine(trainable, frozen)))(trainable)
        with jax.numpy_dtype_promotion("standard"):  # Optax counts steps in integers
            updates, state = tx.update(grads, state, trainable)
        return jpeft.combine(optax.apply_updates(trainable, updates), frozen), state

    state = tx.init(jpeft.partition(params)[0])
    for step in range(1, steps + 1):
        params, state = then(*one(params, state), step=step)
    return params, float(loss(params))


def test_every_entry_is_full_fine_tuning():
    x, y = normal(2, (16, 8)), normal(3, (16, 6))
    full, _ = descend(jpeft.delta({"kernel": KERNEL[0]}), optax.adam(1e-2), 5, x, y)
    aged = optax.chain(TX, optax.scale(-1e-2))
    found, _ = descend(single(density=1.0), aged, 5, x, y)
    np.testing.assert_allclose(jpeft.merge(found)["kernel"], jpeft.merge(full)["kernel"], rtol=1e-5, atol=1e-6)


def test_finds_the_entries_that_have_to_change():
    """A kernel that differs from the base in 20 entries of 400: the same ones train in the end, and few did before."""
    base = normal(0, (20, 20))
    places = jax.random.choice(jax.random.key(8), 400, (20,), replace=False)
    x = normal(2, (64, 20))
    y = x @ base.ravel().at[places].add(1.0).reshape(20, 20)
    tx = optax.chain(TX, optax.scale(-5e-2))
    rates = optax.linear_schedule(0.2, 0.0, 200)

    @jax.jit
    def reselect(params, state, step):
        loss = lambda w: jnp.mean(jnp.square(x @ w - y))
        scores = {"kernel": jax.grad(loss)(jpeft.merge(params)["kernel"])}
        return jpeft.optim.reselect(params, state, scores, rate=rates(step))

    start = jpeft.spiel({"kernel": base}, density=0.05)
    step_by_step = lambda params, state, step: (params, state) if step % 5 else reselect(params, state, jnp.int32(step))
    moved, loss = descend(start, tx, 200, x, y, step_by_step)
    _, fixed = descend(start, tx, 200, x, y)
    share = lambda params: np.isin(places, params["kernel"].indices).mean()
    assert share(start) <= 0.2 and share(moved) >= 0.9
    assert loss < 0.1 * fixed


@pytest.mark.parametrize("below", [jpeft.nf4, lambda params: params])
def test_stands_over_and_under_other_nodes(below):
    base = below({"kernel": normal(0, (64, 64))})
    params, state = trained(jpeft.lora(jpeft.spiel(base, density=0.01), rank=2))
    new, new_state = jpeft.optim.reselect(params, state, {"kernel": normal(7, (64, 64))}, rate=0.5)
    old, found = params["kernel"].base, new["kernel"].base
    assert isinstance(found, jpeft.Sparse) and np.sum(old.indices != found.indices) == 20
    np.testing.assert_array_equal(new["kernel"].a, params["kernel"].a)
    np.testing.assert_array_equal(new_state.mu["kernel"].a, state.mu["kernel"].a)
    assert np.sum(new_state.age["kernel"].base.values == 0) == 20


def test_gradients_over_batches_are_scores():
    method = jpeft.chain(jpeft.spiel(density=0.3), jpeft.unfreeze(targets="bias"))
    params, state = trained(method({"kernel": KERNEL[0], "bias": jnp.ones(6)}))
    model = lambda params, x: x @ params["kernel"] + jnp.broadcast_to(params["bias"], (len(x), 6))
    loss = lambda params, batch: jnp.mean(jnp.sin(jpeft.apply(model, params, batch)))
    batches = [normal(n, (4, 8)) for n in (2, 3)]
    scores = jpeft.gradient_scores(loss, params, batches)
    of_kernel = lambda w, batch: loss({**jpeft.merge(params), "kernel": w}, batch)
    by_hand = sum(jax.grad(of_kernel)(params["kernel"].value(), batch) for batch in batches)
    found, expected = (jpeft.optim.reselect(params, state, x, rate=1.0)[0] for x in (scores, {"kernel": by_hand}))
    np.testing.assert_array_equal(found["kernel"].indices, expected["kernel"].indices)


def test_what_has_no_scores_stays():
    params, state = trained(jpeft.spiel({name: {"kernel": KERNEL[0]} for name in "ab"}, density=0.5))
    new, _ = jpeft.optim.reselect(params, state, {"a": {"kernel": None}, "b": {"kernel": normal(1, (8, 6))}}, rate=0.5)
    np.testing.assert_array_equal(new["a"]["kernel"].indices, params["a"]["kernel"].indices)
    assert np.sum(new["b"]["kernel"].indices != params["b"]["kernel"].indices) == 12


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1), optax.adafactor(0.1)])
def test_optimizers_that_remember_other_things(optimizer):
    params = single(density=0.5)
    state = optimizer.init(jpeft.partition(params)[0])
    _, new = jpeft.optim.reselect(params, state, {"kernel": normal(1, (8, 6))}, rate=0.5)
    assert [x.shape for x in jax.tree.leaves(new)] == [x.shape for x in jax.tree.leaves(state)]


@pytest.mark.parametrize("density", [0.0, 1.5])
def test_refuses_densities(density):
    with pytest.raises(ValueError, match=r"A density is in \(0, 1\]"):
        single(density=density)


def test_refuses_scores_that_do_not_fit():
    params, state = trained(jpeft.spiel({name: {"kernel": KERNEL[0]} for name in "ab"}))
    wrong = {name: {"kernel": normal(1, (6, 8))} for name in "ab"}
    with pytest.raises(ValueError, match=r"a/kernel: \(6, 8\), not \(8, 6\)\n  b/kernel"):
        jpeft.optim.reselect(params, state, wrong, rate=0.1)
    with pytest.raises(ValueError, match=r"No `Sparse` node has scores.*'a/kernel', 'b/kernel'"):
        jpeft.optim.reselect(params, state, {"c": normal(1, (6, 8))}, rate=0.1)


def test_optimizers_of_parts():
    params = jpeft.unfreeze(jpeft.spiel({"kernel": KERNEL[0], "bias": jnp.ones(6)}, density=0.5), targets="bias")
    tx = optax.multi_transform({"kernel": optax.adam(0.1), "bias": optax.sgd(0.1)}, {n: n for n in ("kernel", "bias")})
    trainable, _ = jpeft.partition(params)
    gradients = trainable | {"kernel": trainable["kernel"].replace(values=jnp.ones(24))}
    with jax.numpy_dtype_promotion("standard"):  # Optax counts steps in integers
        _, state = tx.update(gradients, tx.init(trainable))
    new, after = jpeft.optim.reselect(params, state, {"kernel": normal(1, (8, 6))}, rate=0.5)
    stays = new["kernel"].indices == params["kernel"].indices
    assert 0 < stays.sum() < 24
    (moment,) = (x["kernel"].values for _, x in optax.tree.get_all_with_path(after, "mu"))
    np.testing.assert_allclose(moment, jnp.where(stays, 0.1, 0.0), rtol=1e-6)


def test_refuses_a_state_whose_moments_it_would_not_find():
    params = single(density=0.5)
    state = {"moments": jax.tree.leaves(optax.adam(0.1).init(jpeft.partition(params)[0]))}
    with pytest.raises(ValueError, match=r"arrays of shapes \[\(24,\)\]"):
        jpeft.optim.reselect(params, state, {"kernel": normal(1, (8, 6))}, rate=0.1)


@pytest.mark.parametrize("below", [jpeft.spiel(density=0.25), jpeft.unfreeze(targets=".*"), jpeft.delta()])
def test_what_trains_beneath_is_remembered(below):
    params = jpeft.spiel(below({"kernel": KERNEL[0]}), density=0.25, key=jax.random.key(3))
    params, state = trained(params)
    new, new_state = jpeft.optim.reselect(params, state, {"kernel": normal(7, (8, 6))}, rate=0.5)
    assert (new["kernel"].indices != params["kernel"].indices).sum() == 6
    for old, found in ((params, new), (state.mu, new_state.mu), (state.nu, new_state.nu), (state.age, new_state.age)):
        jax.tree.map(np.testing.assert_array_equal, found["kernel"].base, old["kernel"].base)
