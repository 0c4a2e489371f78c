"""CorDA: the parts it starts from, in closed form and against PEFT's."""

import numpy as np
import pytest
from data_driven import LAYERS, PARAMS, X, forward, network, peft

import jpeft


INPUTS = jpeft.capture_inputs(forward, PARAMS, [X])
W = PARAMS["0"]["kernel"]


def test_is_the_best_part_for_its_inputs():
    """Without damping, of all parts of rank r the one nearest to the kernel in the norm |C (W - P)|."""
    c = np.asarray(X.T @ X, np.float64) + 0.1 * np.eye(12)
    inputs = jpeft.Inputs(count=1.0, total=None, energy=None, product=c.astype(np.float32), axes="io")
    node = jpeft.corda(PARAMS, inputs={"0": {"kernel": inputs}}, rank=3, damping=0.0)["0"]["kernel"]
    values = np.linalg.svd(c @ W, compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(c @ (W - node.a @ node.b)), np.linalg.norm(values[3:]), rtol=1e-3)
    principal = jpeft.pissa(PARAMS, rank=3)["0"]["kernel"]
    assert np.linalg.norm(c @ (W - principal.a @ principal.b)) > 1.1 * np.linalg.norm(values[3:])


def test_parts_add_up():
    """The first r and the last of the others are the kernel; the start is the model as it was."""
    first = jpeft.corda(PARAMS, inputs=INPUTS, rank=3, alpha=6)
    node = first["0"]["kernel"]
    rest = jpeft.corda(PARAMS, inputs={"0": INPUTS["0"]}, rank=9, alpha=6, preserve=True)["0"]["kernel"]
    np.testing.assert_allclose(node.scale * node.a @ node.b + rest.scale * rest.a @ rest.b, W, atol=1e-4)
    np.testing.assert_array_equal(forward(first, X), network(PARAMS, X))


def test_scale_of_the_inputs_does_not_matter():
    twice = jpeft.capture_inputs(forward, PARAMS, [X, X], targets="0/kernel")
    one, other = (jpeft.corda(PARAMS, inputs=x, rank=3)["0"]["kernel"] for x in (INPUTS, twice))
    np.testing.assert_allclose(np.abs(one.a), np.abs(other.a), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("preserve", [False, True])
def test_starts_where_peft_does(preserve):
    """The same part of every kernel; how it is split in two depends on how its inputs are scaled."""
    tuned = jpeft.corda(PARAMS, inputs=INPUTS, rank=3, alpha=6, preserve=preserve)
    for n in LAYERS:
        a, b, scale = peft("corda_preserving" if preserve else "corda", n)
        node = tuned[n]["kernel"]
        assert node.scale == scale
        np.testing.assert_allclose(node.a @ node.b, a @ b, atol=1e-3 * np.abs(a @ b).max())


def test_refuses_a_sketch_and_too_high_a_rank():
    with pytest.raises(ValueError, match="8 outputs has no part of rank 9"):
        jpeft.corda(PARAMS, inputs=INPUTS, rank=9)
    sketched = jpeft.capture_inputs(forward, PARAMS, [X], sketch=4)
    with pytest.raises(ValueError, match="leave `sketch` out"):
        jpeft.corda(PARAMS, inputs=sketched, rank=2)
