"""A prompt is tokens of one's own: the model gives what it gives where they stand before the user's tokens."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.models import Classifier
from jpeft.testing import subject


LENGTH, TOKENS = 4, 6
OWN = 28 + jnp.arange(LENGTH)  # tokens that no user's text has: their embeddings will be the prompt's
IDS = jax.random.randint(jax.random.key(1), (2, TOKENS), 0, 28)
MASKS = {
    "none": jnp.ones((2, TOKENS), jnp.int32),
    "right": jnp.ones((2, TOKENS), jnp.int32).at[1, 4:].set(0),
    "left": jnp.ones((2, TOKENS), jnp.int32).at[1, :2].set(0),
}
ROWS = jax.random.normal(jax.random.key(2), (LENGTH, 16))


def table_of(params):
    return params["embeddings"]["word"] if "embeddings" in params else params["embed"]


def with_table(params, table):
    if "embeddings" in params:
        return params | {"embeddings": params["embeddings"] | {"word": {"embedding": table}}}
    return params | {"embed": {"embedding": table}}


def own_tokens(params, rows):
    """The parameters whose embeddings of `OWN` are `rows`."""
    return with_table(params, table_of(params)["embedding"].at[OWN].set(rows))


def front(x, columns):
    """`x` with columns before its own, the same for every row."""
    return jnp.concatenate([jnp.broadcast_to(columns.astype(x.dtype)[None], (x.shape[0], len(columns))), x], axis=1)


def prompted(model, rows, **arguments):
    params = jpeft.prompt(model.params, length=LENGTH, init=rows)
    return jpeft.apply(model.model, {"params": params}, IDS, **arguments)


def prepended(model, rows, **arguments):
    """The user's part of the output where `OWN` are prepended to the tokens, and to what comes with them."""
    places = jnp.arange(LENGTH)
    if "attention_mask" in arguments:
        arguments["attention_mask"] = front(arguments["attention_mask"], jnp.ones(LENGTH))
    if "position_ids" in arguments:
        arguments["position_ids"] = front(arguments["position_ids"] + LENGTH, places)
    if "token_type_ids" in arguments:
        types = arguments["token_type_ids"]
        arguments["token_type_ids"] = jnp.concatenate([jnp.repeat(types[:, :1], LENGTH, axis=1), types], axis=1)
    params = own_tokens(model.params, rows)
    return jpeft.apply(model.model, {"params": params}, front(IDS, OWN), **arguments)[:, LENGTH:]


def close(found, want, tolerance=1e-5):
    np.testing.assert_allclose(found, want, rtol=0, atol=tolerance * np.abs(want).max())


EXPLICIT = {
    "encoder": {
        "position_ids": jnp.array([[0, 1, 2, 4, 5, 7]]),
        "token_type_ids": jnp.array([[0, 0, 0, 1, 1, 1], [1, 1, 0, 0, 1, 1]]),
    },
    "decoder": {"position_ids": jnp.array([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]])},
}


@pytest.mark.parametrize(("scan", "explicit"), [(False, True), (True, False)])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_outputs_and_gradients_are_those_of_tokens(kind, scan, explicit):
    model, more = subject(kind, scan), EXPLICIT[kind] if explicit else {}

    def run(fn):
        def loss(rows, mask):
            y = fn(model, rows, attention_mask=mask, **more)
            return jnp.sum(jnp.cos(jnp.arange(y.size)).reshape(y.shape) * y), y

        return jax.jit(jax.grad(loss, has_aux=True))

    found, want = run(prompted), run(prepended)
    for mask in MASKS.values():
        gradient, y = found(ROWS, mask)
        want_gradient, want_y = want(ROWS, mask)
        assert y.shape[:2] == IDS.shape and not np.allclose(y, want(0 * ROWS, mask)[1], atol=0.1)
        close(y, want_y)
        close(gradient, want_gradient, 1e-4)


@pytest.mark.parametrize(("kind", "scan", "base"), [("decoder", True, "nf4"), ("encoder", False, "int8")])
def test_on_a_quantized_base(kind, scan, base):
    model = subject(kind, scan, base)
    close(jax.jit(lambda rows: prompted(model, rows))(ROWS), jax.jit(lambda rows: prepended(model, rows))(ROWS))


def test_only_the_rows_train():
    trainable, _ = jpeft.partition(jpeft.prompt(subject("decoder").params, length=LENGTH))
    assert [x.shape for x in jax.tree.leaves(trainable)] == [(LENGTH, 16)]
    assert trainable["embed"]["prompt"].rows.shape == (LENGTH, 16)


def test_a_classifier_pools_the_users_tokens():
    """Where the prompt is `within` the encoder; else the mask that the head sees has the prompt's places too."""
    encoder, mask = subject("encoder"), MASKS["right"]
    head = {"kernel": jax.random.normal(jax.random.key(3), (16, 3)), "bias": jnp.ones(3)}
    params = {"encoder": encoder.params, "head": head}

    def run(within):
        tuned = jpeft.prompt(params, length=LENGTH, init=ROWS, within=within)
        return jpeft.apply(Classifier(encoder.model.config, 3), {"params": tuned}, IDS, mask)

    kept = mask[:, :, None].astype(jnp.float32)
    pooled = jnp.sum(kept * prepended(encoder, ROWS, attention_mask=mask), axis=1) / jnp.sum(kept, axis=1)
    want = pooled @ head["kernel"] + head["bias"][None]
    close(run("encoder"), want)
    assert np.abs(run("") - want).max() > 0.1


def test_a_second_prompt_comes_after_the_first():
    model = subject("decoder")
    twice = jpeft.prompt(jpeft.prompt(model.params, length=3, init=ROWS[:3]), length=1, init=ROWS[3:])
    close(jpeft.apply(model.model, {"params": twice}, IDS), prepended(model, ROWS))


class Attends(nn.Module):
    """One attention, of the tokens' embeddings to themselves, with a mask of one's own."""

    @nn.compact
    def __call__(self, ids, mask):
        x = nn.Embed(32, 16, name="embed")(ids)
        scores = x @ jnp.swapaxes(x, 1, 2)
        if mask.ndim == 4:
            mask = mask[:, 0]
        scores = (
            scores + mask if jnp.issubdtype(mask.dtype, jnp.floating) else jnp.where(mask.astype(bool), scores, -1e30)
        )
        return jax.nn.softmax(scores) @ x


CAUSAL = jnp.broadcast_to(jnp.tril(jnp.ones((TOKENS, TOKENS), bool))[None], (2, TOKENS, TOKENS))


@pytest.mark.parametrize(
    "mask",
    [
        CAUSAL,
        CAUSAL.astype(jnp.int32)[:, None],
        jnp.where(CAUSAL, 0.0, jnp.finfo(jnp.float32).min)[:, None],
        MASKS["right"].astype(bool)[:, None, None],
    ],
    ids=[
        "bool (batch, query, key)",
        "int (batch, 1, query, key)",
        "float (batch, 1, query, key)",
        "bool (batch, 1, 1, key)",
    ],
)
def test_masks_of_queries_and_keys(mask):
    """Every token sees the prompt, and what it saw."""
    params = {"embed": {"embedding": jax.random.normal(jax.random.key(0), (32, 16))}}
    found = jpeft.apply(Attends(), {"params": jpeft.prompt(params, length=LENGTH, init=ROWS)}, IDS, mask)
    seen = (mask == 0 if mask.dtype == jnp.float32 else mask.astype(bool)).reshape(2, -1, TOKENS)
    seen = jnp.concatenate([jnp.ones((2, TOKENS, LENGTH), bool), jnp.broadcast_to(seen, (2, TOKENS, TOKENS))], axis=2)
    x = params["embed"]["embedding"][IDS]
    keys = jnp.concatenate([jnp.broadcast_to(ROWS[None], (2, LENGTH, 16)), x], axis=1)
    scores = jnp.where(seen, x @ jnp.swapaxes(keys, 1, 2), -1e30)
    close(found, jax.nn.softmax(scores) @ keys)


class Scores(nn.Module):
    """A model that is given its labels, and returns the positions' and the labels' own."""

    @nn.compact
    def __call__(self, ids, labels):
        x = nn.Embed(32, 16, name="embed")(ids)
        return {"states": x, "labels": labels[:, :, None], "ignored": jnp.sum(labels == -100, axis=1)}


def test_labels_of_the_prompt_are_ignored():
    params = jpeft.prompt({"embed": {"embedding": jnp.ones((32, 16))}}, length=LENGTH)
    found = jpeft.apply(Scores(), {"params": params}, IDS, labels=IDS)
    np.testing.assert_array_equal(found["ignored"], [LENGTH, LENGTH])
    np.testing.assert_array_equal(found["labels"], IDS[:, :, None])
    assert found["states"].shape == (2, TOKENS, 16)
