"""The estimate, by hand, and the arrays of abstract trees."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax.traverse_util import unflatten_dict

import jpeft
from jpeft.hf._load import model_sites, parameter_shapes
from jpeft.hf.architectures import ARCHITECTURES
from jpeft.plan import _plan as planned
from jpeft.plan import estimate


FIELDS = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
}  # fmt: skip
MODEL = ARCHITECTURES["llama"].build(FIELDS, scan=True, param_dtype=jnp.bfloat16)
SHAPES = parameter_shapes(ARCHITECTURES["llama"], MODEL)


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_layer_or_the_head_decides(tensor):
    mesh = {"data": 2, "fsdp": 4, "tensor": tensor}
    b, n, d, h, f, v = 2, 3, 64, 4, 256, 96  # 16 rows on 8 parts
    short, long = 8, 1024
    of = lambda s: estimate(MODEL.config, 1000, 10, SHAPES, mesh, 16, s) - 1010 - n * b * s * d * 2
    layer = lambda s: (3 * b * h * s**2 * 4 + 4 * b * s * f * 2 + 4 * d * f) // tensor
    head = lambda s: (2 * b * s * v * 4 + 2 * v * d * 2) // tensor
    assert of(long) == layer(long) > head(long)
    assert of(short) == max(layer(short), head(short))


@pytest.mark.parametrize("base", ["float", "nf4"])
def test_arrays_are_what_they_hold(base):
    sites = model_sites(ARCHITECTURES["llama"], MODEL, SHAPES)
    adapter = jpeft.lora(rank=2, sites=sites)
    how = jpeft.chain(jpeft.nf4(sites=sites), adapter) if base == "nf4" else adapter
    params = jax.eval_shape(how, unflatten_dict(SHAPES, sep="/"))
    trainable, frozen = jpeft.partition(params)
    layers, d, kv, f, v = 3, 64, 32, 256, 96
    kernels = layers * (2 * d * d + 2 * d * kv + 3 * d * f)
    plain = 2 * v * d + (2 * layers + 1) * d
    rank = 2 * layers * (2 * (d + d) + 2 * (d + kv) + 3 * (d + f))
    assert planned._bytes(trainable) == 4 * rank  # float32
    assert planned._bytes(jax.eval_shape(optax.adamw(1e-3).init, trainable)) == 2 * 4 * rank + 4
    if base == "float":
        assert planned._bytes(frozen) == 2 * (plain + kernels)
    else:  # half a byte for each code, one for 64 of them, four for 256 of those and for each kernel's mean
        chunks = sum(-(-n // (64 * 256)) for n in (d * d, d * d, d * kv, d * kv, d * f, d * f, d * f))
        assert planned._bytes(frozen) == 2 * plain + kernels // 2 + kernels // 64 + 4 * layers * (chunks + 7)
