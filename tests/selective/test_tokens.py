"""Some rows of a table train: the others stay, and a head that is tied to the table sees them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft


TABLE = jax.random.normal(jax.random.key(0), (11, 6))
IDS = jnp.array([[3, 7, 0, 7], [9, 1, 2, 3]])


class Tied(nn.Module):
    """Logits by the table that the tokens come from, scaled as Gemma's."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(11, 6, name="embed")
        return embed.attend(jnp.tanh(6**0.5 * embed(ids)))


def tuned(ids=(7, 2)):
    params = jpeft.tokens({"embed": {"embedding": TABLE}}, ids=ids)
    node = params["embed"]["embedding"]
    np.testing.assert_array_equal(node.rows, TABLE[jnp.array(ids)])
    params["embed"]["embedding"] = node.replace(rows=jax.random.normal(jax.random.key(1), (len(ids), 6)))
    return params


def test_rows_are_replaced_and_others_stay():
    params = tuned()
    found = jpeft.merge(params)["embed"]["embedding"]
    np.testing.assert_array_equal(found[jnp.array([7, 2])], params["embed"]["embedding"].rows)
    others = np.setdiff1d(np.arange(11), [7, 2])
    np.testing.assert_array_equal(found[others], TABLE[others])


def test_a_tied_head_sees_them():
    params = tuned()
    y = jpeft.apply(Tied(), {"params": params}, IDS)
    np.testing.assert_allclose(y, Tied().apply({"params": jpeft.merge(params)}, IDS), rtol=1e-5, atol=1e-5)
    changed = np.abs(y - Tied().apply({"params": jpeft.strip(params)}, IDS)) > 1e-3
    np.testing.assert_array_equal(np.flatnonzero(changed[0, 0]), [2, 7])  # of a token that is as it was
    assert changed[0, 1].all()


def test_a_step_of_sgd_is_that_of_the_whole_table_at_these_rows():
    loss = lambda params: jnp.sum(jnp.cos(jpeft.apply(Tied(), {"params": params}, IDS)))
    params = jpeft.tokens({"embed": {"embedding": TABLE}}, ids=[7, 2])
    trainable, frozen = jpeft.partition(params)
    own = jax.grad(lambda t: loss(jpeft.combine(t, frozen)))(trainable)["embed"]["embedding"].rows
    whole = jax.grad(loss)({"embed": {"embedding": TABLE}})["embed"]["embedding"]
    np.testing.assert_allclose(own, whole[jnp.array([7, 2])], rtol=1e-5, atol=1e-6)


def test_rows_of_a_bfloat16_table_train_in_float32():
    params = jpeft.tokens({"embed": {"embedding": TABLE.astype(jnp.bfloat16)}}, ids=[4])
    assert params["embed"]["embedding"].rows.dtype == jnp.float32
    assert jpeft.merge(params)["embed"]["embedding"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("ids", "message"),
    [([], "at least one"), ([3, 4, 3], r"twice in `ids` are \[3\]"), ([3, 11, -1], r"11 rows has none.*\[11, -1\]")],
)
def test_refuses(ids, message):
    with pytest.raises(ValueError, match=message):
        jpeft.tokens({"embed": {"embedding": TABLE}}, ids=ids)
