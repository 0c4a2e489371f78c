"""What a LoRA step of a decoder costs, by XLA's own analyses: what one written by hand costs, and no more."""

import functools
import math
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import jpeft
from jpeft.models import Decoder, DecoderConfig


RANK, WIDTH = 8, 128
TOKENS = jax.ShapeDtypeStruct((2, 64), jnp.int32)
ADAM = optax.adam(1e-3)

# Without what XLA does to memory on a CPU alone. It drops optimization barriers before it merges equal expressions, so
# that a kernel is dequantized once and kept for the backward pass; and it orders operations by what may run at once.
FOR_MEMORY = {
    "xla_disable_hlo_passes": "cse",
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
}


class HandWritten(nn.Module):
    """`nn.Dense` without a bias, with LoRA in its own code: y = x W + 2 x A B. Not at the output head."""

    features: int
    use_bias: bool
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        param = functools.partial(self.param, init_fn=nn.initializers.normal())
        y = x @ param("kernel", shape=(x.shape[-1], self.features))
        if self.name == "lm_head":
            return y
        return y + 2.0 * (x @ param("a", shape=(x.shape[-1], RANK))) @ param("b", shape=(RANK, self.features))


def cross_entropy(logits, tokens):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]))


def update(tx, gradients, state, params):
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam mixes integers and floats
        updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def compiled(run, params, options=None):
    """One step of Adam on `params = (trainable, frozen)`."""

    def step(trainable, frozen, state, tokens):
        gradients = jax.grad(lambda trainable: cross_entropy(run(trainable, frozen, tokens), tokens))(trainable)
        return update(ADAM, gradients, state, trainable)

    trainable, frozen = params
    state = jax.eval_shape(ADAM.init, trainable)
    return jax.jit(step).lower(trainable, frozen, state, TOKENS).compile(options)


def decoder(layers, scan, remat):
    return Decoder(DecoderConfig(256, WIDTH, 2 * WIDTH, layers, 4, 2), scan=scan, remat=remat)


def by_hand(*how):
    model = decoder(*how)
    with mock.patch.object(nn, "Dense", HandWritten):
        shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
        adapter = lambda path: path[-1].key in ("a", "b")
        pick = lambda wanted: jax.tree.map_with_path(lambda path, x: x if adapter(path) == wanted else None, shapes)
        run = lambda trainable, frozen, tokens: model.apply({"params": jpeft.combine(trainable, frozen)}, tokens)
        return compiled(run, (pick(True), pick(False)))


def adapted(model, quantize=None):
    """The shapes of the parameters of the model with LoRA on all its layers."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    sites = jpeft.sites(model, shapes, TOKENS)

    def methods(params):
        params = params if quantize is None else quantize(params, sites=sites)
        return jpeft.lora(params, rank=RANK, alpha=2 * RANK, sites=sites)

    return jax.eval_shape(methods, shapes["params"])


@functools.cache
def by_engine(*how, quantize=None, for_memory=False):
    """The compiled step, and the bytes that it is given."""
    model = decoder(*how)
    params = jpeft.partition(adapted(model, quantize))
    run = lambda trainable, frozen, tokens: jpeft.apply(model, {"params": jpeft.combine(trainable, frozen)}, tokens)
    given = size_of(params) + size_of(jax.eval_shape(ADAM.init, params[0])) + size_of(TOKENS)
    return compiled(run, params, FOR_MEMORY if for_memory else None), given


def size_of(tree):
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("remat", [False, True], ids=["", "remat"])
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_step_costs_what_one_by_hand_costs(scan, remat):
    by_us, _ = by_engine(4, scan, remat)
    theirs = by_hand(4, scan, remat)
    assert by_us.cost_analysis()["flops"] == pytest.approx(theirs.cost_analysis()["flops"], rel=0.005)
    temp = lambda step: step.memory_analysis().temp_size_in_bytes
    assert temp(by_us) < 1.05 * temp(theirs)


MEMORY = {  # layers, scan, remat
    "4 scanned": (4, True, False),
    "4 scanned, remat": (4, True, True),
    "4 unrolled": (4, False, False),
    "16 scanned": (16, True, False),
    "16 scanned, remat": (16, True, True),
}
SLOW = {
    "4 unrolled, remat": (4, False, True),
    "16 unrolled": (16, False, False),
    "16 unrolled, remat": (16, False, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MEMORY, *SLOW])
def test_quantized_base_is_never_there_as_a_whole(name):
    """The peak is codes, constants, adapters, their optimizer state, activations, and one dequantized kernel."""
    how = (MEMORY | SLOW)[name]
    floats, _ = by_engine(*how, for_memory=True)
    codes, given = by_engine(*how, quantize=jpeft.nf4, for_memory=True)
    activations = floats.memory_analysis().temp_size_in_bytes
    kernel = 4 * WIDTH * 2 * WIDTH
    memory = codes.memory_analysis()
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes <= given + activations + kernel


def test_labels_and_what_reads_all_gradients():
    """Clipping by the norm of all gradients makes XLA compute those of frozen parameters, which `partition` spares."""
    model = decoder(2, True, False)
    params = adapted(model)
    groups = {"trainable": ADAM, "frozen": optax.set_to_zero()}
    one_tree = optax.partition(groups, jpeft.labels)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), one_tree)

    def flops(tx):
        def step(params, state, tokens):
            loss = lambda params: cross_entropy(jpeft.apply(model, {"params": params}, tokens), tokens)
            return update(tx, jax.grad(loss)(params), state, params)

        lowered = jax.jit(step).lower(params, jax.eval_shape(tx.init, params), TOKENS)
        return lowered.compile().cost_analysis()["flops"]

    spared = by_engine(2, True, False)[0].cost_analysis()["flops"]
    assert flops(one_tree) < 1.02 * spared
    assert flops(clipped) > 1.2 * spared
