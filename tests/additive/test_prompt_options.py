"""The starts of a prompt, and where it has no room."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.testing import subject


TABLE = 3 + 2 * jax.random.normal(jax.random.key(0), (50, 16))
PARAMS = {"embed": {"embedding": TABLE}}


def rows(**options):
    return jpeft.prompt(PARAMS, **options)["embed"]["prompt"].rows


def test_vocabulary():
    """Rows of the table, none of them twice while there are enough."""
    found = rows(length=50)
    np.testing.assert_array_equal(np.sort(found, axis=0), np.sort(TABLE, axis=0))
    assert np.any(rows(length=50, key=jax.random.key(1)) != found)
    more = rows(length=60)
    assert more.shape == (60, 16) and np.all(np.any(np.all(more[:, None] == TABLE[None], axis=2), axis=1))


def test_noise():
    """Normal, with the mean and the deviation of the table, in its type."""
    found = rows(length=400, init="noise")
    np.testing.assert_allclose([np.mean(found), np.std(found)], [np.mean(TABLE), np.std(TABLE)], rtol=0.02)
    half = jpeft.prompt({"embed": {"embedding": TABLE.astype(jnp.bfloat16)}}, init="noise")
    assert half["embed"]["prompt"].rows.dtype == jnp.bfloat16


@pytest.mark.parametrize("ids", [[7, 2, 9], np.array([7, 2, 9]), (7, 2, 9)])
def test_token_ids(ids):
    """Repeated, or cut."""
    np.testing.assert_array_equal(rows(length=5, init=ids), TABLE[jnp.array([7, 2, 9, 7, 2])])
    np.testing.assert_array_equal(rows(length=2, init=ids), TABLE[jnp.array([7, 2])])


def test_embeddings():
    given = jax.random.normal(jax.random.key(1), (3, 16))
    np.testing.assert_array_equal(rows(length=3, init=given), given)
    assert rows(length=3, init=np.ones((3, 16), np.int32)).dtype == TABLE.dtype


TWO = {"embed": {"embedding": TABLE}, "decoder": {"token": {"embedding": TABLE}}}


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        (PARAMS, {"length": 0}, "at least one embedding, not 0"),
        (PARAMS, {"init": "text"}, "'text': 'vocabulary', 'noise', token ids, or embeddings"),
        (PARAMS, {"init": [3, 50]}, "token ids outside of the table's 50"),
        (PARAMS, {"init": [-1, 3]}, "token ids outside of the table's 50"),
        (PARAMS, {"init": []}, r"shape \(0,\)"),
        (PARAMS, {"init": jnp.ones((3, 8)), "length": 3}, r"shape \(3, 8\).*\(3, 16\)"),
        (PARAMS, {"within": "encoder"}, "'encoder' matches no module around the embedding"),
        (PARAMS, {"within": "emb"}, "'emb' matches no module around the embedding. Near: embed"),
        (PARAMS, {"targets": "wte/embedding"}, "'wte/embedding' matches no parameter"),
        (TWO, {}, r"Which is the table.*'decoder/token/embedding', 'embed/embedding'"),
        (TWO, {"targets": "embed/embedding", "within": "decoder"}, "'decoder' matches no module around the embedding"),
        ({"head": {"kernel": TABLE}}, {}, "matches no parameter"),
    ],
)
def test_refuses(params, options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.prompt(params, **options)


def test_one_of_two_tables():
    params = jpeft.prompt(TWO, targets="decoder/token/embedding", within="decoder", length=2)
    assert set(params["decoder"]) == {"token", "prompt_room"} and "prompt" in params["decoder"]["token"]
    assert set(params["embed"]) == {"embedding"}


def test_more_positions_than_the_model_has():
    """It is the call that tells how long the sequences are."""
    model = subject("encoder")  # of 12 positions
    run = lambda length: jpeft.apply(model.model, {"params": jpeft.prompt(model.params, length=length)}, *model.args)
    assert run(6).shape == (2, 6, 16)
    with pytest.raises(ValueError, match="6 tokens and a prompt of 7 are 13 positions: the model has 12"):
        run(7)


class Parts(nn.Module):
    """An embedding that is called where it should be, outside of its module, or on floats."""

    call: str

    def setup(self):
        self.inner = Inner()

    def __call__(self, ids, weights=None):
        if self.call == "outside":
            return self.inner.embed(ids)
        if self.call == "floats":
            return self.inner(jnp.ones((2, 3, 4)))
        return self.inner(ids, weights)


class Inner(nn.Module):
    def setup(self):
        self.embed = nn.Embed(50, 16)

    def __call__(self, ids, weights=None):
        return self.embed(ids if ids.ndim == 2 else jnp.ones((2, 3), jnp.int32))


@pytest.mark.parametrize(
    ("call", "weights", "message"),
    [
        ("outside", None, r"no room: the embedding was called with \(2, 3\) ids.*`within=`"),
        ("floats", None, "stands before token ids"),
        ("inside", (2, 3, 3), r"no room in the argument 'weights' of shape \(2, 3, 3\)"),
    ],
)
def test_no_room(call, weights, message):
    params = {"inner": {"embed": {"embedding": TABLE}}}
    params = jpeft.prompt(params, within="inner", targets="inner/embed/embedding", length=2)
    ids = jnp.ones((2, 3), jnp.int32)
    assert jpeft.apply(Parts("inside"), {"params": params}, ids).shape == (2, 3, 16)
    with pytest.raises(ValueError, match=message):
        jpeft.apply(Parts(call), {"params": params}, ids, weights and jnp.ones(weights))
