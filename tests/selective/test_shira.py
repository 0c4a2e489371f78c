"""SHiRA: as many entries as LoRA has parameters, and the same computation as Hugging Face's PEFT."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

import jpeft


PEFT = dict(np.load(Path(__file__).parents[1] / "fixtures/shira/peft.npz"))


def test_outputs_and_gradients_are_those_of_peft():
    """Their rows and columns are those of a weight (out, in)."""
    columns, rows = PEFT["indices"]
    params = jpeft.shira({"kernel": jnp.asarray(PEFT["base/weight"].T)}, rank=2)
    node = params["kernel"]
    assert node.values.shape == PEFT["adapter/shira_weight"].shape
    params = {"kernel": node.replace(values=PEFT["adapter/shira_weight"], indices=rows * node.base.shape[1] + columns)}

    def run(params, x):
        return x @ params["kernel"] + PEFT["base/bias"]

    with jax.numpy_rank_promotion("allow"):
        y = jpeft.apply(run, params, PEFT["x"])
        trainable, frozen = jpeft.partition(params)
        loss = lambda t: jnp.sum(jpeft.apply(run, jpeft.combine(t, frozen), PEFT["x"]) ** 2) / 2
        gradient = jax.grad(loss)(trainable)["kernel"].values
        merged = run(jpeft.merge(params), PEFT["x"])
    np.testing.assert_allclose(y, PEFT["y"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(merged, PEFT["y"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, PEFT["gradient/shira_weight"], rtol=1e-4, atol=1e-4)


def test_entries_are_drawn_without_replacement_for_each_matrix():
    params = jpeft.shira({"w": normal(0, 3, 12, 8)}, rank={"w": 2}, targets={"w": "sio"}, key=jax.random.key(1))
    indices = np.asarray(params["w"].indices)
    assert indices.shape == params["w"].values.shape == (3, 40) and indices.dtype == np.int32
    assert all(len(set(row)) == 40 for row in indices) and indices.min() >= 0 and indices.max() < 96
    assert (indices[0] != indices[1]).any()
    other = jpeft.shira({"w": normal(0, 3, 12, 8)}, rank=2, targets={"w": "sio"}, key=jax.random.key(2))["w"].indices
    assert (indices != other).any()


def test_any_entry_is_as_likely_as_any_other():
    draw = lambda key: jpeft.shira({"w": jnp.ones((6, 4))}, rank=1, targets="w", key=key)["w"].indices
    drawn = jax.vmap(draw)(jax.random.split(jax.random.key(3), 3000))
    shares = np.bincount(np.ravel(drawn), minlength=24) / 3000
    np.testing.assert_allclose(shares, 10 / 24, atol=0.05)


def test_entries_are_kept_where_it_is_saved(tmp_path):
    params = jpeft.shira({"w": normal(0, 12, 8)}, rank=2, targets="w", key=jax.random.key(1))
    jpeft.save(tmp_path / "adapter", params)
    back = jpeft.restore(tmp_path / "adapter", {"w": normal(0, 12, 8)})
    np.testing.assert_array_equal(back["w"].indices, params["w"].indices)


@pytest.mark.parametrize("rank", [0, 5])
def test_refuses_ranks(rank):
    with pytest.raises(ValueError, match=rf"Rank {rank} is .* of shape \(12, 8\): it has 1 to 96"):
        jpeft.shira({"w": normal(0, 12, 8)}, rank=rank, targets="w")
