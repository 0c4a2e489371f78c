"""A prompt in the places of a token: what the model gives where other tokens, whose embeddings it has, stand there."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.models import T5, Decoder, DecoderConfig, T5Config
from jpeft.testing import shaken, subject


PLACE, OTHER = 27, 26  # what stands for prompts, and is in no text
OWN = 28 + jnp.arange(3)  # tokens that no text has: their embeddings will be the prompt's
ROWS = jax.random.normal(jax.random.key(2), (3, 16))
TEXT = jax.random.randint(jax.random.key(1), (2, 8), 0, 26)
# Before, between and after parts of the text, in each row elsewhere; the last of the second row is padding.
AT = np.array([[0, 3, 7], [1, 2, 6]])
MASK = jnp.ones((2, 8), jnp.int32).at[1, 7].set(0)
LEFT = jnp.ones((2, 8), jnp.int32).at[1, 0].set(0)


def put(ids, values):
    return ids.at[np.arange(2)[:, None], AT].set(values)


IDS, WANTED = put(TEXT, PLACE), put(TEXT, OWN[None])


def close(found, want, tolerance=1e-5):
    np.testing.assert_allclose(found, want, rtol=0, atol=tolerance * np.abs(want).max())


def own_tokens(params, rows, table):
    """The parameters whose embeddings of `OWN` are `rows`."""
    *path, last = table.split("/")
    owner = params
    for name in path:
        owner = owner[name]
    new = {last: {"embedding": owner[last]["embedding"].at[OWN].set(rows)}}
    return params | ({path[0]: owner | new} if path else new)


TABLES = {"decoder": "embed", "encoder": "embeddings/word"}


@pytest.mark.parametrize(("kind", "scan"), [("decoder", True), ("encoder", False)])
def test_outputs_and_gradients_are_those_of_tokens(kind, scan):
    model = subject(kind, scan)

    def run(tree, ids):
        def loss(rows, mask):
            y = jpeft.apply(model.model, {"params": tree(rows)}, ids, mask)
            return jnp.sum(jnp.cos(jnp.arange(y.size)).reshape(y.shape) * y), y

        return jax.jit(jax.grad(loss, has_aux=True))

    found = run(lambda rows: jpeft.prompt(model.params, length=3, init=rows, placeholder=PLACE), IDS)
    want = run(lambda rows: own_tokens(model.params, rows, TABLES[kind]), WANTED)
    for mask in (MASK, LEFT):
        gradient, y = found(ROWS, mask)
        want_gradient, want_y = want(ROWS, mask)
        assert y.shape[:2] == IDS.shape and not np.allclose(y, want(0 * ROWS, mask)[1], atol=0.1)
        close(y, want_y)
        close(gradient, want_gradient, 1e-4)


@pytest.mark.parametrize("method", [jpeft.ptuning(width=5), jpeft.ptuning(encoder="lstm", width=5), jpeft.mpt()])
def test_networks_are_put_there_too(method):
    model = subject("decoder")
    params = method(model.params, length=3, placeholder=PLACE)
    node = params["embed"]["prompt"]
    found = jax.jit(lambda params: jpeft.apply(model.model, {"params": params}, IDS, MASK))
    rows = node.prompt(None).reshape(3, 16)
    want = model.model.apply({"params": own_tokens(model.params, rows, "embed")}, WANTED, MASK)
    close(found(params), want)
    close(found(jpeft.collapse(params)), want)


def test_only_the_text_has_places():
    """A token that is masked is none, and of those that are too many no prompt is left."""
    model, mask = subject("decoder"), MASK.at[0, 0].set(0)
    params = jpeft.prompt(model.params, length=3, init=ROWS, placeholder=PLACE)
    ids = IDS.at[1, 7].set(PLACE).at[1, 4].set(PLACE)  # three places in row 0, of which two are seen, and four in row 1
    found = jpeft.apply(model.model, {"params": params}, ids, mask)
    own = jnp.array([[PLACE, 28, 29], [28, 29, PLACE]])
    want = put(TEXT, own).at[1, 4].set(30)
    want = model.model.apply({"params": own_tokens(model.params, ROWS, "embed")}, want, mask)
    seen = mask[:, :, None].astype(jnp.float32)
    close(found * seen, want * seen)


def test_every_segment_has_places_of_its_own():
    """Padding is the segment 0; it has none that is seen."""
    model = subject("decoder")
    params = jpeft.prompt(model.params, length=2, init=ROWS[:2], placeholder=PLACE)
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0]] * 2)
    ids = TEXT.at[:, jnp.array([0, 2, 4, 5])].set(PLACE)
    wanted = TEXT.at[:, jnp.array([0, 4])].set(28).at[:, jnp.array([2, 5])].set(29)
    found = jpeft.apply(model.model, {"params": params}, ids, segment_ids=segments)
    want = model.model.apply({"params": own_tokens(model.params, ROWS, "embed")}, wanted, segment_ids=segments)
    close(found, want)


@pytest.mark.slow
def test_prompts_of_one_place_and_of_others():
    """Those of the same token follow one another; a prompt before the text comes before all of them."""
    model = subject("decoder")
    first = {"length": 1, "init": ROWS[:1], "placeholder": PLACE}
    rest = {"length": 2, "init": ROWS[1:], "placeholder": PLACE}
    other = {"length": 1, "init": ROWS[1:2], "placeholder": OTHER}
    before = {"length": 2, "init": ROWS[:2]}
    ids, wanted = IDS.at[:, 5].set(OTHER), WANTED.at[:, 5].set(29)
    wanted = jnp.concatenate([jnp.broadcast_to(OWN[None, :2], (2, 2)), wanted], axis=1)
    want = jpeft.apply(model.model, {"params": own_tokens(model.params, ROWS, "embed")}, wanted)[:, 2:]
    for order in ((before, first, rest, other), (first, other, rest, before), (other, first, before, rest)):
        params = jpeft.chain(*(jpeft.prompt(**options) for options in order))(model.params)
        cache = model.model.init_cache(2, 8)
        run = jax.jit(lambda params, ids, cache: jpeft.apply(model.model, {"params": params}, ids, cache=cache,
                                                             allow_unused=True))  # fmt: skip
        close(jpeft.apply(model.model, {"params": params}, ids), want)
        found = []
        for part in (ids[:, :4], ids[:, 4:7], ids[:, 7:]):
            y, cache = run(params, part, cache)
            found.append(y)
        close(jnp.concatenate(found, axis=1), want)


@pytest.mark.slow
def test_a_decoder_has_no_places():
    """They are the encoder's, with a cache and without."""
    model = T5(T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4,
                        relative_attention_num_buckets=8, tie_word_embeddings=False))  # fmt: skip
    params = shaken(model.init(jax.random.key(0), IDS, None, IDS)["params"], jax.random.key(3))
    tuned = jpeft.prompt(params, length=3, init=ROWS, placeholder=PLACE)
    written = IDS[:, :4]  # a place among the decoder's tokens is a token
    want = model.apply({"params": own_tokens(params, ROWS, "shared")}, WANTED, MASK, written)
    close(jax.jit(lambda tuned: jpeft.apply(model, {"params": tuned}, IDS, MASK, written))(tuned), want)
    y, cache = jpeft.apply(model, {"params": tuned}, IDS, MASK, written[:, :1], cache=model.init_cache(2, 4))
    rest, _ = jpeft.apply(model, {"params": tuned}, decoder_input_ids=written[:, 1:], cache=cache, allow_unused=True)
    close(jnp.concatenate([y, rest], axis=1), want)


def test_a_decoder_with_the_same_ids_has_no_places():
    model = T5(T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4,
                        relative_attention_num_buckets=8, tie_word_embeddings=False))  # fmt: skip
    params = shaken(model.init(jax.random.key(0), IDS, None, IDS)["params"], jax.random.key(3))
    tuned = jpeft.prompt(params, length=3, init=ROWS, placeholder=PLACE)
    want = model.apply({"params": own_tokens(params, ROWS, "shared")}, WANTED, MASK, IDS)
    close(jpeft.apply(model, {"params": tuned}, IDS, MASK, IDS), want)


def test_generation_goes_on_in_the_template():
    """The last token of a text is read alone: it may be a place, whose number the cache tells."""
    config = DecoderConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                           num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    model = Decoder(config)
    params = shaken(jax.jit(model.init)(jax.random.key(0), IDS)["params"], jax.random.key(3), 1.0)
    tuned = jpeft.prompt(params, length=3, init=ROWS, placeholder=PLACE)
    mask = jnp.array([[1] * 8, [1] * 7 + [0]])
    plain = own_tokens(params, ROWS, "embed")
    run = lambda params, ids: np.asarray(jpeft.generate(model, params, ids, mask, max_new_tokens=9).tokens)
    found, want = run(tuned, IDS), run(plain, WANTED)
    assert IDS[0, -1] == IDS[1, -2] == PLACE and not np.isin(want, OWN).any()
    np.testing.assert_array_equal(found, want)
    assert len(np.unique(found)) > 4 and np.any(found != run(params, IDS))


class Outside(nn.Module):
    """A model whose embedding is called outside of the module that takes ids, too."""

    def setup(self):
        self.inner = Inner()

    def __call__(self, ids):
        return self.inner.embed(ids)


class Inner(nn.Module):
    def setup(self):
        self.embed = nn.Embed(32, 16)

    def __call__(self, ids):
        return self.embed(ids)


def test_refuses():
    model = subject("decoder")
    for placeholder in (-1, 32):
        with pytest.raises(ValueError, match=f"`placeholder` is {placeholder}: .* table's 32"):
            jpeft.prompt(model.params, placeholder=placeholder)
    params = jpeft.prompt(model.params, length=9, placeholder=PLACE)
    with pytest.raises(ValueError, match="Prompts of 9 embeddings take the places of the token 27, and there are 8"):
        jpeft.apply(model.model, {"params": params}, IDS)
    params = {"inner": {"embed": {"embedding": jnp.ones((32, 16))}}}
    params = jpeft.prompt(params, length=2, placeholder=PLACE, within="inner", targets="inner/embed/embedding")
    with pytest.raises(ValueError, match="no room"):
        jpeft.apply(Outside(), {"params": params}, IDS)


def test_no_file_of_peft_has_places(tmp_path):
    model = subject("decoder")
    for method in (jpeft.prompt(length=2), jpeft.mpt(length=2)):
        params = method(model.params, placeholder=PLACE)
        with pytest.raises(ValueError, match=r"PEFT puts prompts before the text.*'embed/prompt': 27"):
            jpeft.hf.save_adapter(tmp_path, params, model=model.model)
