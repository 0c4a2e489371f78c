"""Dense changes become sparse: lottery-ticket fine-tuning, its iterations, and child pruning."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import normal

import jpeft
from jpeft.testing import subject


X, Y = jax.random.normal(jax.random.key(7), (5, 6)), jax.random.normal(jax.random.key(8), (5, 4))


def weights():
    return {
        "up": {"kernel": normal(0, 6, 9), "bias": normal(1, 9)},
        "down": {"kernel": normal(2, 9, 6)},
        "head": {"kernel": normal(3, 6, 4)},
    }


def model(params, x):
    return jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None]) @ params["down"]["kernel"]


def loss(params):
    run = lambda params, x: model(params, x) @ params["head"]["kernel"]
    return jnp.mean((jpeft.apply(run, params, X) - Y) ** 2)


def trained(params, steps=3):
    trainable, frozen = jpeft.partition(params)
    for _ in range(steps):
        grads = jax.grad(lambda t: loss(jpeft.combine(t, frozen)))(trainable)
        trainable = jax.tree.map(lambda x, g: x - 0.02 * g, trainable, grads)
    return jpeft.combine(trainable, frozen)


def begun():
    """A dense change of the body, and a head that trains as it is."""
    return jpeft.unfreeze(jpeft.delta(weights()), targets="head/kernel")


def changes(params):
    """theta - theta_0 of the body."""
    found = jax.tree.map(lambda x, y: np.asarray(x - y), jpeft.merge(params), weights())
    return {name: x for name, x in found.items() if name != "head"}


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def nodes(params):
    is_sparse = lambda x: isinstance(x, jpeft.Sparse)
    return [x for x in jax.tree.leaves(params, is_leaf=is_sparse) if is_sparse(x)]


def close(found, expected):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, expected)


def test_the_largest_changes_stay():
    full = trained(begun())
    few = jpeft.sparsify(full, density=0.25)
    old, new = flat(changes(full)), flat(changes(few))
    stay = np.abs(old) >= np.sort(np.abs(old))[-29]  # of 117 entries
    assert np.count_nonzero(new) == 29 == sum(x.values.size for x in nodes(few))
    np.testing.assert_allclose(new, np.where(stay, old, 0), atol=1e-6)
    np.testing.assert_array_equal(jpeft.merge(few)["head"]["kernel"], jpeft.merge(full)["head"]["kernel"])


def test_rewound_everything_is_as_it_was():
    """Also the head; and the second training is one under the mask."""
    start = begun()
    full = trained(start)
    ticket = jpeft.sparsify(full, density=0.25, rewind=start)
    close(jpeft.merge(ticket), weights())
    kept, one_shot = nodes(ticket), nodes(jpeft.sparsify(full, density=0.25))
    for x, y in zip(kept, one_shot, strict=True):
        np.testing.assert_array_equal(x.indices, y.indices)
    mask = flat(changes(jpeft.sparsify(full, density=0.25))) != 0
    moved = flat(changes(trained(ticket)))
    assert np.count_nonzero(moved[~mask]) == 0 and np.all(moved[mask] != 0)


def test_with_every_entry_it_is_full_fine_tuning_twice():
    start = begun()
    ticket = jpeft.sparsify(trained(start), density=1.0, rewind=start)
    close(jpeft.merge(trained(ticket)), jpeft.merge(trained(start)))


def test_iterations_add_entries():
    """Each unfreezes as many as the last, of those that are still frozen, and starts where the last has ended."""
    params = jpeft.unfreeze(weights(), targets="head/kernel")
    supports = []
    for _ in range(3):
        start = jpeft.delta(params, targets="(up|down)/.*")
        params = trained(jpeft.sparsify(full := trained(start), density=0.1, rewind=start))
        supports.append(flat(changes(params)) != 0)
    assert [s.sum() for s in supports] == [11, 22, 33]
    assert np.all(supports[2][supports[1]]) and np.all(supports[1][supports[0]])
    largest = np.abs(flat(changes(full)) - flat(changes(start)))[~supports[1]]
    added = np.abs(flat(changes(full)) - flat(changes(start)))[supports[2] & ~supports[1]]
    np.testing.assert_allclose(np.sort(added), np.sort(largest)[-11:], rtol=1e-4)


def test_child_pruning_is_a_projection():
    """Under a state of the optimizer that stays: the structure does."""
    full = trained(begun())
    child = jpeft.sparsify(full, density=0.25, dense=True)
    assert jax.tree.structure(child) == jax.tree.structure(full)
    close(jpeft.merge(child), jpeft.merge(jpeft.sparsify(full, density=0.25)))
    close(jpeft.merge(jpeft.sparsify(child, density=0.25, dense=True)), jpeft.merge(child))


def test_gates_of_diff_pruning_count():
    """What stays is the change z D, and not D."""
    params = jpeft.diff_pruning({"w": normal(0, 6, 5)}, targets="w")
    node = params["w"].replace(values=normal(1, 6, 5), alpha=normal(2, 6, 5), alpha_group=jnp.float32(0.5))
    few = jpeft.sparsify({"w": node}, density=0.2)
    change = np.asarray(node.change)
    np.testing.assert_allclose(
        np.asarray(jpeft.merge(few)["w"] - normal(0, 6, 5)),
        np.where(np.abs(change) >= np.sort(np.abs(change).ravel())[-6], change, 0),
        atol=1e-6,
    )


def test_beneath_other_methods_and_on_quantized_kernels():
    """A matrix of which nothing stays has no node."""
    kernels = {"a": {"kernel": normal(0, 32, 16)}, "b": {"kernel": normal(1, 32, 16)}}
    params = jpeft.delta(jpeft.int8(kernels))
    changed = params["a"]["kernel"].replace(values=normal(2, 32, 16))
    few = jpeft.sparsify(jpeft.lora(params | {"a": {"kernel": changed}}, rank=2), density=0.1)
    found = few["a"]["kernel"]
    assert [type(x).__name__ for x in (found, found.base, found.base.base)] == ["LoRA", "Sparse", "Int8"]
    assert found.base.values.size == 102
    assert [type(x).__name__ for x in (few["b"]["kernel"], few["b"]["kernel"].base)] == ["LoRA", "Int8"]


def test_layers_of_a_stack():
    """One ranking of all: layers have lists of different lengths; one of each: of the same."""
    layers = subject("decoder", scan=True)
    start = jpeft.delta(layers.params, targets=r".*mlp/up/kernel", sites=layers.sites)
    node = start["layers"]["mlp"]["up"]["kernel"]
    change = normal(0, 2, 16, 32) * jnp.array([1.0, 3.0])[:, None, None]
    start["layers"]["mlp"]["up"]["kernel"] = node.replace(values=change)
    for scope, count in (("all", 102), ("each", 51 * 2)):
        few = jpeft.sparsify(start, density=0.1, scope=scope)
        moved = jpeft.merge(few)["layers"]["mlp"]["up"]["kernel"] - layers.params["layers"]["mlp"]["up"]["kernel"]
        assert np.count_nonzero(moved) == count
        mask = jpeft.mask_of({"w": jnp.abs(change[1])}, density=0.1)["w"]
        if scope == "each":
            np.testing.assert_array_equal(moved[1] != 0, mask)
        node = few["layers"]["mlp"]["up"]["kernel"]
        assert np.count_nonzero(node.values) == count  # what fills up the shorter list is zero
        np.testing.assert_allclose(layers.run(few), layers.plain(jpeft.merge(few)), rtol=1e-4, atol=1e-4)


def test_refuses():
    with pytest.raises(ValueError, match=r"no Dense node.*jpeft\.delta"):
        jpeft.sparsify(weights(), density=0.1)
    with pytest.raises(ValueError, match="another structure"):
        jpeft.sparsify(begun(), density=0.1, rewind=weights())
    with pytest.raises(ValueError, match="density"):
        jpeft.sparsify(begun(), density=0.0)
    broken = begun()
    broken["up"]["bias"] = broken["up"]["bias"].replace(values=jnp.full(9, jnp.nan)[None])
    with pytest.raises(ValueError, match=r"not a number.*: up/bias"):
        jpeft.sparsify(broken, density=0.1)


def test_a_pull_to_the_start_is_the_norm_of_what_trains():
    """lambda sum |theta - theta_0| / N, as the docs have it."""
    trainable, frozen = jpeft.partition(trained(jpeft.delta(weights(), targets="(up|down)/.*")))
    found = optax.tree.norm(trainable, ord=1) / optax.tree.size(trainable)
    np.testing.assert_allclose(found, np.abs(flat(changes(jpeft.combine(trainable, frozen)))).mean(), rtol=1e-4)
