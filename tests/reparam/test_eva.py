"""EVA: its directions against singular vectors and against PEFT's, and where its ranks go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_driven import LAYERS, PARAMS, X, forward, network, peft, span

import jpeft
import jpeft.testing as laws
from jpeft.reparam._eva import redistributed


INPUTS = jpeft.capture_inputs(forward, PARAMS, [X[:25], X[25:]])


def test_directions():
    """A is the first right-singular vectors of the inputs, orthonormal; B is zero, and the model what it was."""
    tuned = jpeft.eva(PARAMS, inputs=INPUTS, rank=3, rho=1, alpha=6)
    seen = {"0": X, "2": jnp.tanh(X @ PARAMS["0"]["kernel"] + PARAMS["0"]["bias"][None])}
    for n in LAYERS:
        node, v = tuned[n]["kernel"], np.linalg.svd(seen[n])[2][:3].T
        assert isinstance(node, jpeft.LoRA) and node.scale == 2
        np.testing.assert_allclose(node.a.T @ node.a, np.eye(3), atol=1e-5)
        np.testing.assert_allclose(np.abs(node.a.T @ v), np.eye(3), atol=1e-3)
        np.testing.assert_array_equal(node.b, np.zeros((3, PARAMS[n]["kernel"].shape[1])))
    np.testing.assert_array_equal(forward(tuned, X), network(PARAMS, X))


def test_spans_the_inputs_of_low_rank():
    x = jax.random.normal(jax.random.key(0), (30, 3)) @ jax.random.normal(jax.random.key(1), (3, 10))
    run = lambda p, x: jpeft.apply(lambda p, x: x @ p["w"], p, x)
    params = {"w": jax.random.normal(jax.random.key(2), (10, 4))}
    for sketch in (None, 4):
        inputs = jpeft.capture_inputs(run, params, [x], targets="w", sketch=sketch)
        a = jpeft.eva(params, inputs=inputs, rank=3)["w"].a
        np.testing.assert_allclose(a @ (a.T @ x.T), x.T, atol=1e-3)


def test_whitened():
    """Directions are divided by the roots of their singular values."""
    plain, white = (jpeft.eva(PARAMS, inputs=INPUTS, rank=3, rho=1, whiten=w)["0"]["kernel"].a for w in (False, True))
    roots = np.sqrt(np.linalg.svd(X, compute_uv=False)[:3])
    np.testing.assert_allclose(white * roots[None], plain, rtol=1e-3)


STARTS = {"eva_uniform": {"rho": 1.0}, "eva_whitened": {"rho": 1.0, "whiten": True}, "eva": {"rho": 2.0}}


@pytest.mark.parametrize("case", STARTS)
def test_starts_where_peft_does(case):
    """The same ranks, scales and spans. PEFT takes the mean from inputs, and repeats a batch until nothing changes."""
    inputs = jpeft.capture_inputs(forward, PARAMS, [X, X])
    tuned = jpeft.eva(PARAMS, inputs=inputs, rank=3, alpha=6, centered=True, **STARTS[case])
    for n in LAYERS:
        a, b, scale = peft(case, n)
        node = tuned[n]["kernel"]
        assert node.a.shape == a.shape and node.scale == scale
        np.testing.assert_allclose(span(node.a), span(a), atol=1e-3)
        np.testing.assert_allclose(np.linalg.norm(node.a, axis=0), np.linalg.norm(a, axis=0), rtol=1e-3)
        np.testing.assert_array_equal(node.b, b)


def test_peft_takes_the_mean():
    """So that this is another start than the singular vectors of the inputs."""
    a = jpeft.eva(PARAMS, inputs=INPUTS, rank=3, rho=1)["0"]["kernel"].a
    assert np.abs(span(a) - span(peft("eva_uniform", "0")[0])).max() > 0.01


def test_ranks_go_where_they_explain_most():
    """The largest shares of all, within the budget of ten; of a stack for its two kernels at once."""
    shares = {
        "steep": jnp.array([0.9, 0.05, 0.02, 0.01]),
        "flat": jnp.array([0.3, 0.26, 0.2, 0.16]),
        "stack": jnp.array([[0.5, 0.2, 0.1, 0.1], [0.3, 0.3, 0.2, 0.1]]),
        "nothing": jnp.array([0.01, 0.01, 0.0, 0.0]),
    }
    uniform = dict.fromkeys(shares, 2)
    assert redistributed(shares, uniform) == {"steep": 2, "flat": 4, "stack": 2, "nothing": 0}
    assert redistributed({n: x[..., :2] for n, x in shares.items()}, uniform) == uniform


def test_a_kernel_without_rank_stays():
    """Its inputs vary along many directions, and those of the other along two."""
    x, z = jax.random.normal(jax.random.key(0), (40, 8)), jax.random.normal(jax.random.key(1), (40, 2))
    params = {"wide": jnp.eye(8), "narrow": jnp.ones((2, 8))}
    fn = lambda p, x: jnp.sum(x @ p["wide"]) + jnp.sum(z @ p["narrow"])
    inputs = jpeft.capture_inputs(lambda p, x: jpeft.apply(fn, p, x), params, [x], targets=".*")
    tuned = jpeft.eva(params, inputs=inputs, rank=1)
    assert tuned["narrow"].a.shape == (2, 2) and tuned["wide"] is params["wide"]


def test_what_rounding_leaves_of_constant_inputs_is_no_variance():
    """The mean taken away, nothing is left of them: their kernel gets no rank."""
    x, same = jax.random.normal(jax.random.key(0), (1000, 8)), jnp.tile(1.1 * jnp.arange(1.0, 9), (1000, 1))
    params = {"constant": jnp.ones((8, 8)), "varied": jnp.ones((8, 8))}
    fn = lambda p, x: jnp.sum(same @ p["constant"]) + jnp.sum(x @ p["varied"])
    inputs = jpeft.capture_inputs(lambda p, x: jpeft.apply(fn, p, x), params, [x], targets=".*")
    tuned = jpeft.eva(params, inputs=inputs, rank=2, centered=True)
    assert tuned["varied"].a.shape == (8, 4) and tuned["constant"] is params["constant"]


def test_scanned_layers_have_one_rank():
    subject = laws.subject("decoder", scan=True)
    run = lambda p, batch: jpeft.apply(subject.model, {"params": p}, *batch)
    inputs = jpeft.capture_inputs(run, subject.params, [subject.args], sites=subject.sites, mask=lambda batch: batch[1])
    tuned = jpeft.eva(subject.params, inputs=inputs, rank={".*mlp.*": 3, ".*": 2}, alpha=6)
    up = tuned["layers"]["mlp"]["up"]["kernel"]
    assert up.a.shape[0] == 2 and up.axes == "sio" and up.scale == 2
    np.testing.assert_allclose(up.a.mT @ up.a, np.stack([np.eye(up.a.shape[-1])] * 2), atol=1e-4)
    found = tuned["layers"]["mlp"] | tuned["layers"]["attention"]
    ranks = [x["kernel"].a.shape[-1] for x in found.values()]
    assert sum(ranks) == 3 * 3 + 4 * 2 and len(set(ranks)) > 1


@pytest.mark.parametrize("centered", [False, True])
def test_experts_that_see_nothing(centered):
    """They explain nothing, and are no obstacle to others; CorDA starts them as PiSSA does."""
    params, x = {"w": jax.random.normal(jax.random.key(0), (3, 6, 4))}, jax.random.normal(jax.random.key(1), (9, 6))
    fn = lambda p, x: jax.lax.ragged_dot(x, p["w"], jnp.array([5, 0, 4]))
    run = lambda p, x: jpeft.apply(fn, p, x)
    inputs = jpeft.capture_inputs(run, params, [x], targets={"w": "sio"})
    a = jpeft.eva(params, inputs=inputs, rank=2, centered=centered)["w"].a
    np.testing.assert_allclose(a.mT @ a, np.stack([np.eye(2)] * 3), atol=1e-5)
    idle = jpeft.corda(params, inputs=inputs, rank=2)["w"]
    usual = jpeft.pissa({"w": params["w"][1]}, rank=2, targets="w")["w"]
    np.testing.assert_allclose((idle.a @ idle.b)[1], usual.a @ usual.b, atol=1e-4)


def test_in_a_chain_on_codes():
    tuned = jpeft.chain(jpeft.int8(), jpeft.eva(inputs=INPUTS, rank=2))(PARAMS)
    assert isinstance(tuned["0"]["kernel"].base, jpeft.Int8)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"rho": 0.5}, "`rho` is at least 1, not 0.5"),
        ({"rank": 17}, "Of the inputs of '0/kernel' 12 directions were kept: no rank of 17"),
        ({"rank": 0}, "rank of at least 1"),
        ({"dropout": 1.0}, r"dropout in \[0, 1\)"),
        ({"inputs": {"0": None}}, "`inputs` holds none"),
        ({"inputs": {"0": INPUTS["2"], "1": INPUTS["0"]}}, r"\): 0/kernel: \(16,\); 1/kernel: \(12,\)\. Capture"),
        ({"rank": {"nowhere": 1, ".*": 2}}, "'nowhere' matches no target of the option `rank`"),
    ],
)
def test_refuses(how, message):
    with pytest.raises(ValueError, match=message):
        jpeft.eva(PARAMS, **{"inputs": INPUTS, **how})
