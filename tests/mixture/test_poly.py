"""Poly and MHR against the formula, written by hand, against single LoRAs, and beside prompts of tasks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_moe_lora import DENSE, PARAMS, X, close, trained

import jpeft
from jpeft._tree import nodes_of
from jpeft.testing import subject


TASKS = jnp.array([2, 0])
EXAMPLE = X[..., :4]


class Outer(nn.Module):
    """A model around the layer."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="dense")(x)


MODEL = Outer()
BASE = MODEL.init(jax.random.key(0), EXAMPLE)["params"]


def tuned(**options):
    return trained(jpeft.poly(BASE, **{"rank": 3, "tasks": 3, "skills": 4} | options))


def run(params, **more):
    return jpeft.apply(MODEL, {"params": params}, EXAMPLE, **more)


def by_formula(params, x, tasks, scale):
    """Example by example, split by split, skill by skill."""
    own, rows = params["dense"], []
    node = own["poly"]
    for example, task in zip(x, tasks.tolist(), strict=True):
        a, b = [], []
        for q in range(node.a.shape[0]):
            z = 1 / (1 + jnp.exp(-node.logits[task, q]))
            w = z / jnp.sum(z)
            a.append(sum(w[k] * node.a[q, k] for k in range(len(w))))
            b.append(sum(w[k] * node.b[q, k] for k in range(len(w))))
        a, b = jnp.concatenate(a, 0), jnp.concatenate(b, 1)
        rows.append(example @ own["kernel"] + own["bias"][None] + scale * example @ a @ b)
    return jnp.stack(rows)


@pytest.mark.parametrize("splits", [1, 2, 4])
def test_formula_and_gradients(splits):
    params = tuned(splits=splits, alpha=6)
    close(run(params, task_ids=TASKS), by_formula(params, EXAMPLE, TASKS, 2))

    def slopes(fn):
        def loss(parts):
            y = fn({**params, "dense": {**params["dense"], "poly": params["dense"]["poly"].replace(**parts)}})
            return jnp.mean((y - jnp.cos(jnp.arange(y.size)).reshape(y.shape)) ** 2)

        return jax.grad(loss)({n: getattr(params["dense"]["poly"], n) for n in ("a", "b", "logits")})

    found = slopes(lambda p: run(p, task_ids=TASKS))
    assert all(np.abs(g).max() > 1e-4 for g in found.values()) and not np.any(found["logits"][1])
    close(found, slopes(lambda p: by_formula(p, EXAMPLE, TASKS, 2)), 1e-4)


def test_rows_are_those_of_their_tasks_alone():
    params = tuned(splits=2)
    found = run(params, task_ids=TASKS)
    for n, task in enumerate(TASKS.tolist()):
        alone = jpeft.collapse(params, task=task)
        assert jax.tree.structure(alone) == jax.tree.structure(jpeft.lora(BASE, rank=3, alpha=1))
        close(found[n], run(alone)[n])
        close(found[n], MODEL.apply({"params": jpeft.merge(alone)}, EXAMPLE)[n])
    assert np.abs(run(jpeft.collapse(params, task=0)) - run(jpeft.collapse(params, task=2))).max() > 0.01


@pytest.mark.parametrize(("scan", "base"), [(False, "float"), pytest.param(True, "nf4", marks=pytest.mark.slow)])
def test_one_skill_is_lora(scan, base):
    """Whatever its logit, with alpha = 1."""
    model = subject(scan=scan, base=base)
    params = trained(jpeft.poly(model.params, rank=2, skills=1, targets=".*/(query|down)/kernel", sites=model.sites))
    found, alone = model.run(params), jpeft.collapse(params)
    loras = nodes_of(alone, jpeft.LoRA)
    assert {x.scale for x in loras.values()} == {0.5} and "tasks" not in alone
    for path, node in nodes_of(params, jpeft.Poly).items():
        lora = loras[path.replace("poly", "kernel")]
        np.testing.assert_array_equal(lora.a, jnp.squeeze(node.a, (-4, -3)))
        np.testing.assert_array_equal(lora.b, jnp.squeeze(node.b, (-4, -3)))
    assert np.abs(found - model.output).max() > 0.1
    close(found, model.run(alone), 1e-4)


def test_other_tasks_have_no_mixture():
    params = tuned()
    found = run(params, task_ids=TASKS.at[0].set(3))
    assert np.all(np.isnan(found[0])) and np.all(np.isfinite(found[1:]))
    with pytest.raises(ValueError, match="no task 3: there are 3"):
        jpeft.collapse(params, task=3)


def test_a_certain_task_has_its_skill():
    params = tuned(skills=2)
    node = params["dense"]["poly"]
    sure = node.replace(logits=jnp.array([[[-90.0, 90.0]], [[90.0, -90.0]], [[90.0, 90.0]]]))
    params["dense"]["poly"] = sure
    for task, a, b in [(0, node.a[0, 1], node.b[0, 1]), (1, node.a[0, 0], node.b[0, 0])]:
        lora = jpeft.collapse(params, task=task)["dense"]["kernel"]
        close((lora.a, lora.b), (a, b))
    both = jpeft.collapse(params, task=2)["dense"]["kernel"]
    products = (node.a[0, 0] @ node.b[0, 0] + node.a[0, 1] @ node.b[0, 1]) / 2
    assert np.abs(both.a @ both.b - products).max() > 0.1  # factors are mixed, and not products


def test_weights_are_drawn_for_every_example():
    """Of a binary Concrete distribution: sigmoid(logit + logistic noise)."""
    params = tuned(skills=2)
    node = params["dense"]["poly"].replace(logits=jnp.array([[[1.0, -0.5]]]))
    node = node.replace(a=jnp.zeros_like(node.a).at[0, 0, 0, 0].set(1))  # which shows the first weight
    a, _ = node.mixed(jnp.zeros(20_000, jnp.int32), jax.random.key(0))
    noise = np.random.default_rng(0).logistic(size=(20_000, 2))
    z = 1 / (1 + np.exp(-np.array([1.0, -0.5]) - noise))
    levels = [0.05, 0.25, 0.5, 0.75, 0.95]
    np.testing.assert_allclose(np.quantile(a[:, 0, 0], levels), np.quantile(z[:, 0] / z.sum(-1), levels), atol=0.02)
    call = lambda key: run(params, task_ids=jnp.zeros(2, jnp.int32), rngs={"dropout": key})
    one, other = call(jax.random.key(0)), call(jax.random.key(1))
    np.testing.assert_array_equal(one, call(jax.random.key(0)))
    assert np.abs(one - other).max() > 0.01
    single = trained(jpeft.poly(BASE, rank=3))  # without `task_ids`, too
    same = jnp.broadcast_to(EXAMPLE[:1], EXAMPLE.shape)
    y = jpeft.apply(MODEL, {"params": single}, same, rngs={"dropout": jax.random.key(0)})
    assert np.abs(y[0] - y[1]).max() > 0.01


def test_compiled_for_all_tasks_at_once():
    params, traces = tuned(), []

    @jax.jit
    def compiled(tasks):
        traces.append(tasks)
        return run(params, task_ids=tasks)

    for tasks in (TASKS, TASKS[::-1]):
        close(compiled(tasks), run(params, task_ids=tasks))
    assert len(traces) == 1


@pytest.mark.parametrize("first", ["mpt", "poly"])
def test_beside_a_prompt_of_tasks(first):
    """One argument is for both, whichever was attached first."""
    model = subject()
    methods = {
        "mpt": jpeft.mpt(tasks=3, length=2, factors="normal"),
        "poly": jpeft.poly(tasks=3, rank=2, targets=".*/value/kernel"),
    }
    order = [methods[first], *(fn for name, fn in methods.items() if name != first)]
    params = trained(jpeft.chain(*order)(model.params))
    ids, mask = model.args
    found = jpeft.apply(model.model, {"params": params}, ids, mask, task_ids=TASKS)
    for n, task in enumerate(TASKS.tolist()):
        alone = jpeft.collapse(params, task=task)
        assert not nodes_of(alone, jpeft.Poly) and not nodes_of(alone, jpeft.MPT)
        close(found[n], model(alone)[n], 1e-4)


def test_faults():
    params = tuned()
    with pytest.raises(ValueError, match="Which of the 3 tasks"):
        run(params)
    with pytest.raises(ValueError, match=r"Which of the 3 tasks.*collapse"):
        jpeft.collapse(params)
    with pytest.raises(ValueError, match=r"`task_ids` for 3 examples.*\(2, 5, 4\)"):
        run(params, task_ids=jnp.zeros(3, jnp.int32))
    for wrong in ({"tasks": 0}, {"skills": 0}, {"splits": 0}, {"splits": 3}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
            jpeft.poly(BASE, **wrong)
    assert jpeft.apply(DENSE, {"params": jpeft.poly(PARAMS)}, X).shape == (2, 5, 4)
