"""Biases train: those that a model has, and those that it is given."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import pytest
from arrays import waves
from tuning import train, trained_paths

import jpeft
from jpeft._targets import named_leaves
from jpeft.models import T5, Decoder, DecoderConfig, T5Config
from jpeft.testing import shaken, subject


W, V = jnp.ones((4, 4)), jnp.ones(4)
PARAMS = {
    "relative_attention_bias": {"embedding": W},
    "query": {"kernel": W},
    "norm": {"scale": V},
}


def test_bitfit_wants_biases():
    """A table of relative positions is none, whatever it is called."""
    with pytest.raises(ValueError, match=r"no parameter named `bias`.*`jpeft.norms`.*`jpeft.unfreeze`"):
        jpeft.bitfit(PARAMS)
    with pytest.raises(ValueError, match="no parameter named `bias`"):
        jpeft.bitfit(subject("decoder").params)
    assert trained_paths(jpeft.bitfit(PARAMS | {"out": {"kernel": W, "bias": V}, "bias": V})) == {"out/bias", "bias"}
    with pytest.raises(ValueError, match=r"'queri/bias' matches no parameter"):
        jpeft.bitfit(PARAMS | {"out": {"bias": V}}, targets="queri/bias")


IDS = jax.random.randint(jax.random.key(1), (2, 6), 0, 32)


@pytest.mark.parametrize("scan", [False, True])
def test_created_biases_are_biases(scan):
    """After training they are what BitFit makes of a model that was built with biases, all zero."""
    config = DecoderConfig(32, 16, 24, 2, 4, 2)
    plain = Decoder(config, scan=scan)
    with_all = dataclasses.replace(config, attention_bias=True, attention_out_bias=True, mlp_bias=True)
    biased = Decoder(with_all, scan=scan)
    params = shaken(jax.jit(plain.init)(jax.random.key(0), IDS)["params"], jax.random.key(2))
    created = jpeft.bitfit(params, create=True, sites=jpeft.sites(plain, {"params": params}, IDS))

    def with_biases(tree):
        """The parameters of `biased`: the vectors beside modules are in their places."""
        if not isinstance(tree, dict):
            return tree
        own = {name: with_biases(x) for name, x in tree.items() if name != "beft"}
        return own | ({"bias": tree["beft"].bias} if "beft" in tree else {})

    def trained(model, params):
        trainable, frozen = jpeft.partition(params)
        run = lambda t: waves(jpeft.apply(model, {"params": jpeft.combine(t, frozen)}, IDS))
        return jpeft.combine(train(run, trainable), frozen)

    found = with_biases(trained(plain, created))
    start = with_biases(created)
    assert not any(x.any() for name, x in named_leaves(start).items() if name.endswith("bias"))
    chex.assert_trees_all_close(found, jpeft.merge(trained(biased, jpeft.bitfit(start))), rtol=1e-4, atol=1e-6)
    assert all(x.any() for x in jax.tree.leaves(found))


def test_created_biases_are_targeted_by_the_paths_that_they_would_have():
    """Beside those that the model has; a table of relative positions is not among them, nor is the head."""
    params = {"up": {"kernel": W, "bias": V}, "down": {"kernel": W}, "lm_head": {"kernel": W}, "norm": {"scale": V}}
    created = jpeft.bitfit(params, create=True)
    assert trained_paths(created) == {"up/bias"} and created["down"]["beft"].bias.shape == (4,)
    assert {name for name in ("up", "lm_head", "norm") if "beft" in created[name]} == set()
    assert jpeft.summary(jpeft.bitfit(params, create=True, targets="down/bias")).trainable == 4
    assert "beft" not in jpeft.bitfit(params, create=True, targets="up/.*")["down"]
    with pytest.raises(ValueError, match=r"'downn/bias' matches no parameter. Near: down/bias"):
        jpeft.bitfit(params, create=True, targets="downn/bias")
    with pytest.raises(ValueError, match="down/beft: BEFT, whose module has no bias to take it in"):
        jpeft.merge(created)


def test_t5_gets_no_bias_for_relative_positions():
    model = T5(T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4))
    params = jax.eval_shape(lambda key: model.init(key, IDS, decoder_input_ids=IDS), jax.random.key(0))["params"]
    created = jax.eval_shape(jpeft.bitfit(create=True), params)
    kernels = [name for name in named_leaves(params) if name.endswith("/kernel") and not name.startswith("lm_head")]
    assert len(jax.tree.leaves(jpeft.partition(created)[0])) == len(kernels)
