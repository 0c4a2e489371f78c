"""Steps that are not finite never happened, whatever optimizer there is and wherever the NaN comes from."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.optim import NonFiniteError, check_finite, skip_nonfinite


PARAMS = {"kernel": jnp.arange(6.0).reshape(2, 3) / 5, "bias": jnp.array([1.0, -2.0, 0.5]), "frozen": None}
LABELS = {"kernel": "fast", "bias": "slow", "frozen": None}
OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.5),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9)),
    "clipped by entry": lambda: optax.chain(optax.clip(1.0), optax.sgd(0.1)),  # makes 1 of infinity
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=2),
    "noisy": lambda: optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(7)), optax.adam(1e-2)),
    "several": lambda: optax.MultiSteps(optax.adamw(1e-2), 3).gradient_transformation(),
    "masked": lambda: optax.masked(optax.adam(1e-2), {"kernel": True, "bias": False, "frozen": None}),
    "parted": lambda: optax.partition({"fast": optax.adam(0.1), "slow": optax.lion(1e-2)}, LABELS),
    "plateau": lambda: optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=2, accumulation_size=2)),
}
BAD = [jnp.nan, jnp.inf, -jnp.inf]


def bits(tree):
    """What tells every array from others, NaN from NaN too."""
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return [(jax.tree_util.keystr(p), str(x.dtype), x.shape, np.asarray(raw(x)).tobytes())
            for p, x in jax.tree_util.tree_leaves_with_path(tree)]  # fmt: skip


def gradients(n, dtype="float32"):
    keys = iter(jax.random.split(jax.random.key(n), 2))
    return jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape, dtype), PARAMS)


def poisoned(grads, where, bad):
    return grads | {where: grads[where].at[(-1,) * grads[where].ndim].set(bad)}


def stepper(tx):
    @jax.jit
    def step(params, state, grads, value):
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    return step


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_never_happened(name):
    """With NaN and infinity in the loss or in any gradient between finite steps, these are as if alone."""
    tx = skip_nonfinite(OPTIMIZERS[name]())
    step = stepper(tx)
    params, state = PARAMS, tx.init(PARAMS)
    plain, plain_state = params, state
    skipped = 0
    for n in range(5):
        plain, plain_state = step(plain, plain_state, gradients(n), jnp.float32(n))
        params, state = step(params, state, gradients(n), jnp.float32(n))
        assert int(state.in_a_row) == 0
        for bad in BAD:
            faults = [(gradients(9), bad), *((poisoned(gradients(9), x, bad), 1.0) for x in ("kernel", "bias"))]
            for grads, value in faults:
                before = bits((params, state.inner))
                params, state = step(params, state, grads, jnp.float32(value))
                assert bits((params, state.inner)) == before
                skipped += 1
        assert (int(state.skipped), int(state.in_a_row)) == (skipped, 9)
    assert bits((params, state.inner)) == bits((plain, plain_state.inner))
    assert bits(params) != bits(PARAMS)


def test_in_a_scan_and_in_bfloat16():
    params = jax.tree.map(lambda x: x.astype("bfloat16"), PARAMS)
    tx = skip_nonfinite(optax.adamw(1e-2, weight_decay=0.5))
    step = stepper(tx)
    losses = jnp.array([1, jnp.nan, 2, jnp.inf, jnp.nan, 3], "float32")
    grads = [gradients(n, "bfloat16") for n in range(len(losses))]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *grads)

    def body(carry, now):
        return step(*carry, *now), None

    (found, state), _ = jax.lax.scan(body, (params, tx.init(params)), (stacked, losses))
    expected, plain = params, tx.init(params)
    for n in np.flatnonzero(np.isfinite(losses)):
        expected, plain = step(expected, plain, grads[n], losses[n])
    assert bits((found, state.inner)) == bits((expected, plain.inner))
    assert (int(state.skipped), int(state.in_a_row)) == (3, 0)


def test_what_the_optimizer_makes_of_finite_gradients():
    """0 / 0 in an update, and a square that overflows in a state whose update is 0."""
    signed = jax.tree.map(lambda x: x.at[0].set(-0.0), PARAMS)
    zero_over_zero = skip_nonfinite(optax.scale_by_rms(eps=0.0, initial_scale=0.0))
    overflow = skip_nonfinite(optax.scale_by_adam())
    for tx, size in ((zero_over_zero, 0.0), (overflow, 1e30)):
        grads = jax.tree.map(lambda x, size=size: jnp.full_like(x, size), PARAMS)
        state = tx.init(PARAMS)
        updates, new = tx.update(grads, state, PARAMS)
        assert bits(optax.apply_updates(signed, updates)) == bits(signed)
        assert bits(new.inner) == bits(state.inner)
        assert (int(new.skipped), int(new.in_a_row)) == (1, 1)


def test_extra_arguments_go_on():
    """The plateau's best loss is infinity, which may stay, until the mean of two that were given."""
    tx = skip_nonfinite(OPTIMIZERS["plateau"]())
    state = tx.init(PARAMS)
    for value, best in ((2.0, jnp.inf), (4.0, 3.0)):
        _, state = tx.update(gradients(0), state, PARAMS, value=jnp.float32(value))
        assert (state.inner[1].best_value, int(state.skipped)) == (best, 0)
    tuned = jpeft.lora({"kernel": jnp.eye(4)}, rank=2, freeze_a=True)
    trainable, frozen = jpeft.partition(tuned)
    tx = skip_nonfinite(jpeft.optim.lora_fa(optax.sgd(1.0)))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, trainable), tx.init(trainable), trainable, frozen=frozen)
    assert any(x.any() for x in jax.tree.leaves(updates))


def test_the_optimizer_never_sees_them():
    """Of the SVD of a NaN LAPACK may never come back."""
    seen = []
    tx = skip_nonfinite(optax.stateless(lambda grads, params: seen.append(grads) or grads))
    for grads, value in ((poisoned(gradients(0), "bias", jnp.nan), 1.0), (gradients(0), jnp.inf), (gradients(0), 1.0)):
        tx.update(grads, tx.init(PARAMS), PARAMS, value=jnp.float32(value))
    assert [bool(x["bias"].any()) for x in seen] == [False, False, True]


def test_side_by_side_each_has_its_own():
    tx = skip_nonfinite(optax.adamw(1e-2))
    both = jax.tree.map(lambda x: jnp.stack([x, x]), PARAMS)
    grads = jax.tree.map(lambda x: x.at[0].set(jnp.nan), both)
    state = jax.vmap(tx.init)(both)
    updates, state = jax.vmap(tx.update)(grads, state, both)
    assert not updates["kernel"][0].any() and updates["kernel"][1].any()
    assert state.skipped.tolist() == [1, 0]
    with pytest.raises(NonFiniteError):
        check_finite(state, limit=1)


GUARDS = [(skip_nonfinite, []), (lambda tx: optax.apply_if_finite(tx, 2), [2, 3])]


@pytest.mark.parametrize(("guard", "given_in"), GUARDS)
def test_it_never_gives_in(guard, given_in):
    """As `optax.apply_if_finite` does."""
    tx = guard(optax.scale(-0.1))
    grads, state, spoilt = poisoned(gradients(0), "bias", jnp.nan), tx.init(PARAMS), []
    for n in range(4):
        updates, state = tx.update(grads, state, PARAMS)
        if not jnp.isfinite(updates["bias"]).all():
            spoilt.append(n)
    assert spoilt == given_in


def test_a_run_ends_after_so_many_in_a_row():
    tx = optax.chain(optax.identity(), skip_nonfinite(optax.adam(1e-2)))
    state = tx.init(PARAMS)
    for n, bad in enumerate([True, True, False, True, True, True]):
        grads = poisoned(gradients(n), "bias", jnp.inf if bad else 0.0)
        _, state = tx.update(grads, {"anywhere": state}["anywhere"], PARAMS)
        if n < 5:
            check_finite({"anywhere": state}, limit=3)
    with pytest.raises(NonFiniteError, match=r"3 steps in a row .*; 5 steps in all"):
        check_finite({"anywhere": state}, limit=3)
    with pytest.raises(ValueError, match=r"0 states of .*tx = jpeft\.optim\.skip_nonfinite"):
        check_finite(optax.adam(1e-2).init(PARAMS), limit=3)
    with pytest.raises(ValueError, match="a limit of 0"):
        check_finite(state, limit=0)


DIVIDED = """
import jax, jax.numpy as jnp, numpy as np, optax, re
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jpeft.optim import skip_nonfinite
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "tensor"))
put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
params = {"kernel": put(jnp.ones((16, 8)), "data", "tensor"), "bias": put(jnp.ones(8), "tensor")}
for tx, guarded in ((optax.adamw(1e-2), False), (skip_nonfinite(optax.adamw(1e-2)), True)):
    state = tx.init(params)
    update = jax.jit(tx.update, donate_argnums=1).lower(params, state, params).compile()
    sizes = re.findall(r"= (.*?) (?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)[-a-z]*\\(",
                       update.as_text())
    assert bool(sizes) == guarded, sizes
    assert all(set(re.findall(r"\\[(.*?)\\]", size)) == {""} for size in sizes), sizes  # of one element each
    updates, state = update(params, state, params)
    assert updates["kernel"].sharding == params["kernel"].sharding
"""


@pytest.mark.slow
def test_bad_numbers_before_every_step():
    """The program that `make faults` runs for every optimizer, array and number."""
    sys.path.append(str(Path(__file__).parents[1] / "faults"))
    import nonfinite

    with jax.numpy_dtype_promotion("standard"):
        assert nonfinite.main(["--steps", "3", "--count", "8", "--only", "multi_steps", "galore"]) == 0


@pytest.mark.slow
def test_a_divided_tree_is_not_gathered():
    """What it adds on eight devices are reductions of single numbers."""
    flags = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", DIVIDED], env=flags, check=True)
