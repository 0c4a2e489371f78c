"""A prompt of tokens is those tokens in decoders that do more with embeddings: Gemma's scale, GPT-2's positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_prompt import IDS, LENGTH, MASKS, OWN, close, front

import jpeft
from jpeft.models import Decoder, DecoderConfig
from jpeft.testing import shaken


SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
MODELS = {
    "gemma": DecoderConfig(**SIZES, num_key_value_heads=1, scale_embeddings=True, norm_offset=1.0,
                           tie_word_embeddings=True, max_position_embeddings=64),
    "gpt2": DecoderConfig(**SIZES, num_key_value_heads=2, learned_positions=True, gated=False, norm="layer",
                          attention_bias=True, attention_out_bias=True, mlp_bias=True, max_position_embeddings=12),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_of_tokens_is_the_tokens(name):
    model = Decoder(MODELS[name])
    params = shaken(jax.jit(model.init)(jax.random.key(0), IDS)["params"], jax.random.key(3), 0.5)
    tuned = jpeft.prompt(params, length=LENGTH, init=OWN)
    plain = jax.jit(lambda mask: model.apply({"params": params}, front(IDS, OWN), front(mask, jnp.ones(LENGTH))))
    found = jax.jit(lambda mask: jpeft.apply(model, {"params": tuned}, IDS, mask))
    alone = model.apply({"params": params}, IDS)
    for mask in MASKS.values():
        seen = np.asarray(mask, np.float32)[:, :, None]  # padding on the left sees nothing of its own
        close(found(mask) * seen, plain(mask)[:, LENGTH:] * seen)
    assert not np.allclose(found(MASKS["none"]), alone, atol=0.1)
    in_places = jpeft.prompt(params, length=2, init=OWN[:2], placeholder=27)
    ids = IDS.at[:, 2].set(27).at[:, 5].set(27)
    want = model.apply({"params": params}, ids.at[:, 2].set(OWN[0]).at[:, 5].set(OWN[1]))
    close(jpeft.apply(model, {"params": in_places}, ids), want)
