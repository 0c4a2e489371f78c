"""Prompts that networks and factors make: PEFT's, the plain prompts that they come to, and one for every task."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.testing import shaken, subject


ARRAYS = dict(np.load(Path(__file__).parents[1] / "fixtures" / "additive" / "peft.npz"))
IDS = jax.random.randint(jax.random.key(1), (2, 6), 0, 32)


def close(found, want, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


def of_peft(case, kind):
    """The parameters (`kind` is "p") or gradients ("g") of a case, as the fields of `PTuning`."""
    start = f"{case}/{kind}/"
    own = {k.removeprefix(start): jnp.asarray(x) for k, x in ARRAYS.items() if k.startswith(start)}
    linear = lambda n: (own[f"mlp_head.{n}.weight"].T, own[f"mlp_head.{n}.bias"])
    mlp = tuple(linear(n) for n in (0, 2, 4) if f"mlp_head.{n}.weight" in own)

    def direction(end):
        bias = own[f"lstm_head.bias_ih_{end}"]  # PEFT has two, which are summed; their gradients are the same
        bias = bias + own[f"lstm_head.bias_hh_{end}"] if kind == "p" else bias
        return own[f"lstm_head.weight_ih_{end}"].T, own[f"lstm_head.weight_hh_{end}"].T, bias

    layers = [end for end in ("l0", "l1") if f"lstm_head.weight_ih_{end}" in own]
    lstm = tuple((direction(end), direction(f"{end}_reverse")) for end in layers)
    return {"rows": own["embedding.weight"], "mlp": mlp, "lstm": lstm}


@pytest.mark.parametrize("case", ["ptuning_mlp", "ptuning_lstm"])
def test_networks_of_peft(case):
    fields = of_peft(case, "p")
    assert len(fields["lstm"]) == (2 if case == "ptuning_lstm" else 0)

    def loss(fields):
        y = jpeft.PTuning(**fields).prompt(None)
        return jnp.sum(y**2) / 2, y

    grads, y = jax.jit(jax.grad(loss, has_aux=True))(fields)
    close(y, ARRAYS[f"{case}/y"])
    close(grads, of_peft(case, "g"), 1e-4)


def test_tasks_of_peft():
    names = {"rows": "embedding.weight", "u": "prefix_task_cols", "v": "prefix_task_rows"}
    fields = lambda kind: {field: jnp.asarray(ARRAYS[f"mpt/{kind}/{name}"]) for field, name in names.items()}

    def loss(fields):
        y = jpeft.MPT(**fields).prompt(jnp.asarray(ARRAYS["mpt/x"]))
        return jnp.sum(y**2) / 2, y

    grads, y = jax.grad(loss, has_aux=True)(fields("p"))
    close(y, ARRAYS["mpt/y"])
    close(grads, fields("g"), 1e-4)


def trained(method):
    """The parameters with random numbers in all that trains."""
    trainable, frozen = jpeft.partition(method(subject("decoder").params))
    return jpeft.combine(shaken(trainable, jax.random.key(2), 0.5), frozen)


def run(params, **how):
    return jax.jit(lambda params: jpeft.apply(subject("decoder").model, {"params": params}, IDS, **how))(params)


@pytest.mark.parametrize(
    "method",
    [jpeft.ptuning(length=3, width=5), jpeft.ptuning(length=3, encoder="lstm", width=5), jpeft.mpt(length=3, rank=2)],
)
def test_collapsed_is_a_prompt_of_the_same_output(method):
    params = trained(method)
    plain = jpeft.collapse(params)
    assert type(plain["embed"]["prompt"]) is jpeft.Prompt
    close(run(plain), run(params))
    rows = plain["embed"]["prompt"].rows
    close(run(jpeft.prompt(subject("decoder").params, length=3, init=rows)), run(params))


def test_every_example_has_the_prompt_of_its_task():
    params = trained(jpeft.mpt(tasks=3, length=4))
    found = run(params, task_ids=jnp.array([2, 0]))
    for n, task in enumerate((2, 0)):
        close(found[n], run(jpeft.collapse(params, task=task))[n])
    with pytest.raises(ValueError, match=r"Which of the 3 tasks.*task_ids"):
        run(params)
    with pytest.raises(ValueError, match="Which of the 3 tasks"):
        jpeft.collapse(params)


def test_other_tasks_have_no_prompt():
    params = trained(jpeft.mpt(tasks=3, length=4))
    found = run(params, task_ids=jnp.array([2, 3]))
    assert np.all(np.isfinite(found[0])) and np.all(np.isnan(found[1]))
    with pytest.raises(ValueError, match="no task 3: there are 3"):
        jpeft.collapse(params, task=3)


def test_factors_of_one_are_the_shared_prompt():
    init = jax.random.normal(jax.random.key(3), (4, 16))
    params = jpeft.mpt(subject("decoder").params, tasks=2, rank=3, length=4, init=init)
    for task in range(2):
        close(jpeft.collapse(params, task=task)["embed"]["prompt"].rows, init)
    small = jpeft.mpt(subject("decoder").params, length=4, init=init, factors="normal")
    assert np.abs(jpeft.collapse(small)["embed"]["prompt"].rows).max() < 0.01


def test_other_prompts_take_no_tasks():
    params = jpeft.prompt(subject("decoder").params, length=4)
    with pytest.raises(TypeError, match="task_ids"):
        run(params, task_ids=jnp.array([0, 0]))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (jpeft.ptuning(encoder="rnn"), "encoder='rnn'"),
        (jpeft.ptuning(width=0), "width=0"),
        (jpeft.ptuning(encoder="lstm", layers=0), "layers=0"),
        (jpeft.ptuning(length=0), "at least one embedding"),
        (jpeft.mpt(tasks=0), "tasks=0"),
        (jpeft.mpt(rank=0), "rank=0"),
        (jpeft.mpt(factors="zeros"), "factors='zeros'"),
    ],
)
def test_refuses(method, message):
    with pytest.raises(ValueError, match=message):
        method(subject("decoder").params)
