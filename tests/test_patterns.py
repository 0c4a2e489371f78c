"""Patterns of parameters by their kind."""

import re

import jax.numpy as jnp
import pytest

import jpeft
from jpeft import patterns
from jpeft._targets import named_leaves
from jpeft.testing import subject


def kinds(names):
    """What the patterns say that parameters are."""
    every = {kind: x for kind, x in vars(patterns).items() if kind.isupper() and isinstance(x, str)}
    return {name: {kind for kind, x in every.items() if re.fullmatch(x, name)} for name in names}


def test_patterns_of_kinds():
    """In models of this library, and in names that others have."""
    want = {
        "layers_0/attention_norm/scale": {"NORM"},
        "layers_0/attention/query/kernel": {"ATTENTION"},
        "layers_0/attention/query/bias": {"ATTENTION", "BIAS"},
        "decoder/layers/cross_attention/key/kernel": {"ATTENTION", "CROSS_ATTENTION"},
        "decoder/layers/cross_attention_norm/scale": {"NORM"},
        "layers/mlp/up/kernel": {"MLP"},
        "encoder/relative_attention_bias/embedding": {"ATTENTION"},
        "embeddings/token_type/embedding": {"EMBEDDING"},
        "embeddings/norm/bias": {"NORM", "BIAS"},
        "class_token": {"EMBEDDING"},
        "head/kernel": {"HEAD"},
        "lm_head/bias": {"HEAD", "BIAS"},
        "block/0/layer/1/EncDecAttention/q/kernel": {"ATTENTION", "CROSS_ATTENTION"},
        "layers/0/encoder_attn/k_proj/kernel": {"ATTENTION", "CROSS_ATTENTION"},
        "encoder_attn_layer_norm/bias": {"NORM", "BIAS"},
        "h/0/ln_1/scale": {"NORM"},
        "h/0/ln2/bias": {"NORM", "BIAS"},
        "encoder/layer/0/intermediate/dense/kernel": {"MLP"},
        "encoder/layer/0/output/dense/kernel": {"MLP"},
        "encoder/layer/0/output/LayerNorm/scale": {"NORM"},
        "encoder/layer/0/attention/output/dense/kernel": {"ATTENTION"},
        "h/0/mlp/c_fc/kernel": {"MLP"},
        "encoderblock_0/MultiHeadDotProductAttention_0/query/kernel": {"ATTENTION"},
        "encoderblock_0/MlpBlock_0/Dense_0/kernel": {"MLP"},
        "transformer/wte/embedding": {"EMBEDDING"},
        "rel_embedding": set(),
        "headway/kernel": set(),
    }
    assert kinds(want) == want
    for kind in ("encoder", "decoder"):
        names = named_leaves(subject(kind).params)
        assert all(kinds(names).values()), kinds(names)


def test_a_tied_head_is_named():
    params = {"embed": {"embedding": jnp.ones((4, 4))}, "up": {"kernel": jnp.ones((4, 4))}}
    for targets in (patterns.HEAD, "lm_head/kernel", "(.*/)?head/.*"):
        with pytest.raises(ValueError, match=r"tied to the embeddings is one parameter with them: embed/embedding"):
            jpeft.unfreeze(params, targets=targets)
    with pytest.raises(ValueError) as e:
        jpeft.unfreeze(params, targets="down/kernel")
    assert "tied" not in str(e.value)
