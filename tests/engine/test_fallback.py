"""What no rule reaches takes the node's value, is right, and counted; what has no branch goes where a branch does."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from constructs import LORA, Construct, normal
from function_constructs import FUNCTIONS, D, matrix
from jax import lax
from linen_constructs import LINEN, Around, mapped
from test_constructs import check

import jpeft


class ConvBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.Conv(4, (3,), name="conv")(x), None


def halved(w, x):
    """A kernel that changes from one iteration to the next."""
    return lax.fori_loop(0, 2, lambda _, carry: (carry[0] / 2, carry[1] @ carry[0]), (w, x))[1]


IMAGE = normal(3, 5, 4)
NO_RULE = {
    "sin": matrix(lambda w, x: x @ jnp.sin(w), told=False),
    "times itself": matrix(lambda w, x: x @ (w * w), told=False),
    "product with itself": matrix(lambda w, x: x @ (w @ w), told=False),
    "sort": matrix(lambda w, x: jnp.sort(w, axis=0), told=False),
    "every other column": matrix(lambda w, x: x @ w[:, ::2], told=False),
    "a fused kernel, split": matrix(lambda w, x: sum(jnp.tanh(x @ w) for w in jnp.split(w, 3, axis=1)), shape=(D, 15)),
    "lookup of columns": matrix(lambda w, x: w[:, jnp.array([1, 1, 3])], told=False),
    "a product, and more": matrix(lambda w, x: x @ w + jnp.sum(w)),
    "halved in a loop": matrix(halved, told=False),
    "grouped convolution": Construct(nn.Conv(4, (3,), feature_group_count=2), (IMAGE,), {"kernel": "iio"}, told=False),
    "mapped convolution": Construct(Around(mapped, ConvBlock), (IMAGE,), {"block/conv/kernel": "siio"}, told=False),
    "returned": matrix(lambda w, x: w, told=False),
}


@pytest.mark.parametrize("name", NO_RULE)
def test_no_rule(name):
    check(NO_RULE[name], way="merged")


class Rotation(jpeft.Reparam):
    """W' = Q W: a method that does not say what it does to activations."""

    q: jpeft.Trainable[jax.Array, "in in"]

    def weight(self, w):
        return self.q @ w


def lora_on_int8(params, **how):
    return LORA(jpeft.int8(params, **how), **how)


def lora_on_rotation_on_int8(params, **how):
    rotation = lambda key, w: Rotation(q=jnp.eye(len(w)))
    return LORA(jpeft.wrap(jpeft.int8(params, **how), rotation, **how), **how)


METHODS = {lora_on_int8: "branched", lora_on_rotation_on_int8: "merged"}
HOLDERS = (
    "nn.scan, axis 1", "nn.scan of remat", "nn.vmap", "nn.while_loop", "nn.jit", "nn.Conv 2-D", "nn.Embed", "cond",
    "custom_vjp", "ragged_dot", "contraction over experts", "scaled",
)  # fmt: skip


@pytest.mark.parametrize("name", HOLDERS)
@pytest.mark.parametrize("method", METHODS)
def test_without_a_branch(method, name):
    check((LINEN | FUNCTIONS)[name], method, METHODS[method])
