"""A decoder of a few thousand random parameters, and what it makes of a text, computed anew for every token."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import jpeft
from jpeft.models import Decoder, DecoderConfig


VOCABULARY = 61
CONFIG = DecoderConfig(
    vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=80,
)  # fmt: skip
MODEL = Decoder(CONFIG)
TOKENS = jnp.zeros((1, 2), jnp.int32)


@cache
def params(model=MODEL):
    """So large that texts do not repeat themselves."""
    shapes, rng = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"], np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)


def prompts():
    """Three rows of 7 columns, with padding on the left, on the right, and in between."""
    ids = np.random.default_rng(0).integers(1, VOCABULARY, (3, 7))
    mask = np.array([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 0, 1, 1]])
    return ids, mask


def rows():
    """The same without padding."""
    return [row[kept > 0].tolist() for row, kept in zip(*prompts(), strict=True)]


@partial(jax.jit, static_argnums=0)
def logits(model, params, ids):
    return jpeft.apply(model, {"params": params}, ids)


def recomputed(model, params, row, count):
    """The `count` most probable tokens after a row, one by one, by the whole text."""
    text = np.zeros((1, 16), np.int32)
    text[0, : len(row)] = row
    for n in range(len(row), len(row) + count):  # what comes later, a causal model does not see
        text[0, n] = int(jnp.argmax(logits(model, params, text)[0, n - 1]))
    return text[0, len(row) : len(row) + count].tolist()


def letters():
    """A tokenizer whose tokens are the letters, some pairs, and one that is special."""
    alphabet = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ."
    tokens = ["<end>", *alphabet, "th", "he", "in", "er", "an", "re"]
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer
