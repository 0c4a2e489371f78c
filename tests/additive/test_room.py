"""A prompt in calls of every kind: with a cache, labels, segments, a decoder, and of models that return structures."""

import itertools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.models import T5, Encoder, EncoderConfig, T5Config
from jpeft.testing import shaken, subject


LENGTH, TOKENS = 4, 6
OWN = 28 + jnp.arange(LENGTH)  # tokens that no user's text has: their embeddings will be the prompt's
IDS = jax.random.randint(jax.random.key(1), (2, TOKENS), 0, 28)
MASK = jnp.ones((2, TOKENS), jnp.int32).at[1, :2].set(0)
ROWS = jax.random.normal(jax.random.key(2), (LENGTH, 16))


def close(found, want, tolerance=1e-5):
    np.testing.assert_allclose(found, want, rtol=0, atol=tolerance * np.abs(want).max())


def front(x, columns):
    """`x` with columns before its own, the same for every row."""
    return jnp.concatenate([jnp.broadcast_to(columns.astype(x.dtype)[None], (len(x), len(columns))), x], axis=1)


def prompted(model, table="embed"):
    """The parameters with the prompt, and those in which tokens have it."""
    tuned = jpeft.prompt(model.params, length=LENGTH, init=ROWS)
    whole = model.params[table]["embedding"].at[OWN].set(ROWS)
    return tuned, model.params | {table: {"embedding": whole}}


def calls(model, params, ids, mask, cuts, cache, positions=None):
    """The logits of calls with parts of the tokens, one after the other, and the last cache."""
    found = []
    run = jax.jit(lambda ids, mask, positions, cache: jpeft.apply(model, {"params": params}, ids, mask, positions,
                                                                  cache=cache, allow_unused=True))  # fmt: skip
    for start, stop in itertools.pairwise(cuts):
        places = None if positions is None else positions[:, start:stop]
        y, cache = run(ids[:, start:stop], mask[:, start:stop], places, cache)
        found.append(y)
    return jnp.concatenate(found, axis=1), cache


@pytest.mark.parametrize(("scan", "explicit"), [(False, True), (True, False)])
def test_a_cache_has_the_prompt(scan, explicit):
    """The first call puts it there; the cache is made for the tokens alone. Padding may be counted or not."""
    model = subject("decoder", scan)
    tuned, own = prompted(model)
    positions = jnp.maximum(jnp.cumsum(MASK, axis=1, dtype=jnp.int32) - 1, 0) if explicit else None
    y, cache = calls(model.model, tuned, IDS, MASK, (0, 4, 5, 6), model.model.init_cache(2, TOKENS), positions)
    if explicit:
        positions = front(positions + LENGTH, jnp.arange(LENGTH))
    mask = front(MASK, jnp.ones(LENGTH))
    want = jpeft.apply(model.model, {"params": own}, front(IDS, OWN), mask, positions)[:, LENGTH:]
    close(y[0], want[0])
    close(y[1, 2:], want[1, 2:])
    assert cache.filled and cache.keys.shape[2] == TOKENS + LENGTH and int(cache.end) == TOKENS + LENGTH


def test_two_prompts_in_a_cache():
    model = subject("decoder")
    _, own = prompted(model)
    tuned = jpeft.prompt(jpeft.prompt(model.params, length=3, init=ROWS[:3]), length=1, init=ROWS[3:])
    y, _ = calls(model.model, tuned, IDS, MASK, (0, 5, 6), model.model.init_cache(2, TOKENS))
    want = jpeft.apply(model.model, {"params": own}, front(IDS, OWN), front(MASK, jnp.ones(LENGTH)))[:, LENGTH:]
    close(y[1, 2:], want[1, 2:])


def test_losses_are_those_of_the_tokens():
    """The first is predicted from the prompt."""
    model = subject("decoder")
    tuned, own = prompted(model)
    labels = IDS.at[:, 3].set(-100)
    found = jpeft.apply(model.model, {"params": tuned}, IDS, labels=labels)
    want = model.model.apply({"params": own}, front(IDS, OWN), labels=front(labels, jnp.full(LENGTH, -100)))
    assert found.shape == IDS.shape and np.all(found[:, 3] == 0) and np.all(found[:, 0] > 0)
    close(found, want[:, LENGTH:])


def test_every_segment_has_the_prompt_before_it():
    """As if it stood alone; padding is the segment 0."""
    model = subject("decoder")
    tuned, own = prompted(model)
    segments = jnp.array([[1, 1, 2, 2, 2, 0], [1, 1, 2, 2, 2, 0]])
    y = jpeft.apply(model.model, {"params": tuned}, IDS, segment_ids=segments)
    for at in (slice(0, 2), slice(2, 5)):
        close(y[:, at], model.model.apply({"params": own}, front(IDS[:, at], OWN))[:, LENGTH:])


@pytest.fixture(scope="module")
def t5():
    """A T5 whose parameters are all random, its prompt, and the parameters in which tokens have it."""

    class Model:
        model = T5(T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4,
                            relative_attention_num_buckets=8, tie_word_embeddings=False))  # fmt: skip

    Model.params = shaken(Model.model.init(jax.random.key(0), IDS, None, IDS)["params"], jax.random.key(3))
    return Model.model, *prompted(Model, "shared")


@pytest.mark.parametrize("targets", [3, TOKENS, TOKENS + LENGTH])
def test_a_decoder_has_no_prompt(t5, targets):
    """It is the encoder's, whatever the number of the decoder's tokens."""
    model, tuned, own = t5
    ids = jax.random.randint(jax.random.key(4), (2, targets), 0, 28)
    found = jax.jit(lambda **how: jpeft.apply(model, {"params": tuned}, IDS, MASK, **how))
    plain = jax.jit(lambda **how: model.apply({"params": own}, front(IDS, OWN), front(MASK, jnp.ones(LENGTH)), **how))
    for how in ({"decoder_input_ids": ids}, {"labels": ids}):
        assert found(**how).shape[:2] == (2, targets)
        close(found(**how), plain(**how))


@pytest.mark.slow
def test_a_cache_of_a_decoder(t5):
    model, tuned, _ = t5
    ids = jax.random.randint(jax.random.key(4), (2, 3), 0, 28)
    want = jpeft.apply(model, {"params": tuned}, IDS, MASK, ids)
    y, cache = jpeft.apply(model, {"params": tuned}, IDS, MASK, ids[:, :2], cache=model.init_cache(2, 3))
    close(y, want[:, :2])
    run = lambda **how: jpeft.apply(model, {"params": tuned}, decoder_input_ids=ids[:, 2:], cache=cache, **how)
    close(run(allow_unused=True)[0], want[:, 2:])
    with pytest.raises(jpeft.UnusedNodeError, match="shared/prompt"):
        run()


@flax.struct.dataclass
class Output:
    """What a model returns: states of tokens, one for a text, and something that is no array."""

    states: jax.Array
    pooled: jax.Array
    name: str = flax.struct.field(pytree_node=False, default="output")


class Structured(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(32, 16, name="embed")(ids)
        return Output(states=x, pooled=jnp.sum(x, axis=1)), [x[:, :, 0], 3, None]


def test_structures_are_cut_in_their_arrays():
    """Of three axes or more; two may be (batch, features)."""
    params = jpeft.prompt({"embed": {"embedding": jnp.ones((32, 16))}}, length=LENGTH)
    output, (plain, number, nothing) = jpeft.apply(Structured(), {"params": params}, IDS)
    assert output.states.shape == (2, TOKENS, 16) and output.name == "output"
    np.testing.assert_array_equal(output.pooled, jnp.full((2, 16), TOKENS + LENGTH))
    assert plain.shape == (2, TOKENS + LENGTH) and number == 3 and nothing is None


class Weighed(nn.Module):
    @nn.compact
    def __call__(self, ids, loss_mask):
        x = nn.Embed(32, 16, name="embed")(ids)
        return jnp.sum(jnp.sum(x, axis=2) * loss_mask), x


@pytest.mark.parametrize("placeholder", [None, 31])
def test_a_mask_of_losses_is_not_of_tokens(placeholder):
    """The prompt has no part in the loss; its places in a text, which have none either, are places."""
    ids, counts = IDS.at[:, :LENGTH].set(31), jnp.ones((2, TOKENS)).at[:, :LENGTH].set(0)
    params = Weighed().init(jax.random.key(0), ids, counts)["params"]
    tuned = jpeft.prompt(params, length=LENGTH, init=ROWS, placeholder=placeholder)
    loss, x = jpeft.apply(Weighed(), {"params": tuned}, ids, counts)
    close(loss, Weighed().apply({"params": params}, ids, counts)[0])
    close(x[:, :LENGTH], params["embed"]["embedding"][ids[:, :LENGTH]] if placeholder is None else np.stack([ROWS] * 2))


def test_position_ids_of_numpy_stay_as_they_are():
    model = subject("decoder")
    tuned, _ = prompted(model)
    _, cache = calls(model.model, tuned, IDS, MASK, (0, 4), model.model.init_cache(2, TOKENS))
    positions = np.array([[4, 5], [4, 5]], np.int32)
    jpeft.apply(model.model, {"params": tuned}, IDS[:, 4:], None, positions, cache=cache, allow_unused=True)
    np.testing.assert_array_equal(positions, [[4, 5], [4, 5]])


def test_a_prompt_before_padding_without_positions():
    """RoBERTa counts the tokens that are no padding: the prompt's are none."""
    model = Encoder(EncoderConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                  num_attention_heads=2, max_position_embeddings=16, padding_idx=0))  # fmt: skip
    ids = jnp.where(MASK == 1, jnp.maximum(IDS, 1), 0)
    params = shaken(model.init(jax.random.key(0), ids)["params"], jax.random.key(3), 0.5)
    tuned = jpeft.prompt(params, length=LENGTH, init=OWN)
    found = jpeft.apply(model, {"params": tuned}, ids, MASK)
    want = model.apply({"params": params}, front(ids, OWN), front(MASK, jnp.ones(LENGTH)))[:, LENGTH:]
    close(found[0], want[0])
    close(found[1, 2:], want[1, 2:])
