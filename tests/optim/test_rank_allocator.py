"""AdaLoRA's allocator against that of Hugging Face's PEFT, and what is known of it in closed form."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

import jpeft
from jpeft.optim import rank_allocator


PEFT = np.load(Path(__file__).parents[1] / "fixtures/adalora/peft.npz")
ARRAYS = ("a", "e", "b")


def tree(**shapes):
    """AdaLoRA of rank 4 with nothing zero; of shapes with three axes the first is stacked."""
    axes = {name: "sio"[-len(shape) :] for name, shape in shapes.items()}
    params = jpeft.adalora({n: jnp.ones(s) for n, s in shapes.items()}, rank=4, targets=axes)
    filled = lambda k, node: node.replace(**{n: normal(k, *getattr(node, n).shape) for n in ARRAYS})
    return {name: filled(k, node) for k, (name, node) in enumerate(params.items())}


def gradients(params, n=9):
    trainable, _ = jpeft.partition(params)
    return jax.tree.map(lambda x: normal(n, *x.shape), trainable)


def masks(params):
    return np.concatenate([np.asarray(node.mask).ravel() for node in params.values()])


def alive(params):
    return np.concatenate([np.asarray(node.e != 0).ravel() for node in params.values()])


def trained(params, allocator, steps):
    """The trees after every step of an optimizer that moves each array a little, e off zero too."""
    update, state = jax.jit(allocator.update), allocator.init(params)
    for n in range(steps):
        _, frozen = jpeft.partition(params)
        grads = gradients(params, n)
        params = jpeft.combine(jax.tree.map(lambda x, g: x - 0.01 * g, jpeft.partition(params)[0], grads), frozen)
        params, state = update(params, grads, state)
        yield params


def test_parity_with_peft():
    """Every step: values, regrown ones too; in the end both averages and the masks."""
    params = tree(**{"0": (12, 8), "2": (8, 6)})
    allocator = rank_allocator(total_steps=12, target_rank=2, warmup_steps=2, final_steps=3, every=2)
    state, update = allocator.init(params), jax.jit(allocator.update)
    set_to = lambda node, prefix: node.replace(**{n: jnp.asarray(PEFT[f"{prefix}/{n}"]) for n in ARRAYS})
    for step in range(1, 13):
        params = {name: set_to(node, f"{step}/{name}") for name, node in params.items()}
        trainable, _ = jpeft.partition(params)
        grads = {name: set_to(node, f"{step}/gradient/{name}") for name, node in trainable.items()}
        params, state = update(params, grads, state)
        for name, node in params.items():
            np.testing.assert_array_equal(node.e, PEFT[f"{step}/left/{name}/e"])
        assert masks(params).all() == (step < 9)
    for name, sensitivity, uncertainty in zip(params, state.sensitivity, state.uncertainty, strict=True):
        for k, array in enumerate(ARRAYS):
            np.testing.assert_allclose(sensitivity[k], PEFT[f"sensitivity/{name}/{array}"], rtol=1e-5, atol=1e-9)
            np.testing.assert_allclose(uncertainty[k], PEFT[f"uncertainty/{name}/{array}"], rtol=1e-5, atol=1e-9)
        np.testing.assert_array_equal(params[name].mask, PEFT[f"mask/{name}/e"])


def test_as_many_as_the_budget_tells():
    """The budget is over all matrices, each layer of a stack for one: 3 + 1 of rank 4, to a mean of 1.5."""
    allocator = rank_allocator(total_steps=10, target_rank=1.5, warmup_steps=1, final_steps=1)
    left = lambda t: 1 - (t - 1) / 8
    budget = [16, *(6 + int(10 * left(t) ** 3) for t in range(2, 9)), 6, 6]
    assert budget[:4] == [16, 12, 10, 8]
    trees = list(trained(tree(stack=(3, 8, 6), lone=(5, 7)), allocator, 10))
    assert [alive(params).sum() for params in trees] == budget
    assert [masks(params).sum() for params in trees] == [16] * 8 + [6] * 2
    per_matrix = masks(trees[-1]).reshape(4, 4).sum(1)
    assert len(set(per_matrix)) > 1, "no matrix got more than another"


def test_values_grow_again_until_the_end():
    allocator = rank_allocator(total_steps=9, target_rank=1, final_steps=1, every=4)
    *during, last, after = trained(tree(w=(8, 6)), allocator, 9)
    assert [alive(params).sum() for params in during] == [4, 4, 4, 1, 4, 4, 4]
    assert alive(last).sum() == alive(after).sum() == 1
    change = jpeft.merge(after)["w"] - 1
    assert np.linalg.matrix_rank(change, tol=1e-5) == 1


@pytest.mark.parametrize(("target", "kept"), [(4, 8), (2, 4), (0, 0)])
def test_ties_and_a_budget_of_everything(target, kept):
    """Where all scores are equal, the first are kept, and not all masked; and all of them, if the target says so."""
    params = jax.tree.map(lambda x: jnp.ones_like(x), tree(w=(8, 6), v=(8, 6)))
    allocator = rank_allocator(total_steps=1, target_rank=target)
    params, _ = allocator.update(params, jpeft.partition(params)[0], allocator.init(params))
    np.testing.assert_array_equal(masks(params), np.arange(8) < kept)


def test_scores():
    """One step from zero: I' = (1 - b1) I, U' = (1 - b2) b1 I; of the triplets the two largest remain."""
    params = tree(w=(8, 6))
    node, grads = params["w"], gradients(params)
    allocator = rank_allocator(total_steps=2, target_rank=2, beta1=0.9, beta2=0.6)
    present, state = allocator.update(params, grads, allocator.init(params))
    assert masks(present).all()
    done, _ = allocator.update(params, grads, state)
    score = lambda n: np.abs(getattr(node, n) * getattr(grads["w"], n)) ** 2 * 0.1 * 0.4 * 0.9
    total = score("e") + score("a").mean(0) + score("b").mean(1)
    np.testing.assert_array_equal(done["w"].mask, total >= np.sort(total)[2])
    np.testing.assert_array_equal(done["w"].e, np.where(done["w"].mask, node.e, 0))


def test_nothing_else_changes():
    """Neither the factors, nor other methods, and one compiled function serves every step."""
    params = {"w": tree(w=(8, 6))["w"], "v": jpeft.lora({"v": jnp.ones((4, 4))}, rank=2, targets="v")["v"]}
    allocator = rank_allocator(total_steps=4, target_rank=1)
    update = jax.jit(chex.assert_max_traces(allocator.update, 1))
    state, after, grads = allocator.init(params), params, jpeft.partition(params)[0]
    for _ in range(4):
        after, state = update(after, grads, state)
    chex.assert_trees_all_equal(after["v"], params["v"])
    chex.assert_trees_all_equal((after["w"].a, after["w"].b), (params["w"].a, params["w"].b))
    assert after["w"].mask.sum() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 5, "warmup_steps": 2, "final_steps": 3}, "No step is left"),
        ({"total_steps": 5, "every": 0}, "every=0"),
        ({"total_steps": 5, "beta2": 1.0}, "beta2=1.0"),
    ],
)
def test_refuses_options(options, message):
    with pytest.raises(ValueError, match=message):
        rank_allocator(**options)


def test_refuses_trees():
    allocator = rank_allocator(total_steps=5, target_rank=5)
    with pytest.raises(ValueError, match="There are 4 triplets, from which a `target_rank` of 5 makes 5"):
        allocator.init(tree(w=(8, 6)))
    with pytest.raises(ValueError, match="no AdaLoRA node"):
        allocator.init({"w": jnp.ones((8, 6))})
