"""ReLoRA: what a restart keeps, what it forgets, and the rank that it makes room for."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import normal

import jpeft
from jpeft.optim import relora_restart, relora_schedule


X = jax.random.normal(jax.random.key(0), (20, 12))
Y = jax.random.normal(jax.random.key(1), (20, 10))
RANK = 2


def model(params, x):
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"] + params["bias"]


def weights():
    return {"up": {"kernel": normal(2, 12, 16)}, "down": {"kernel": normal(3, 16, 10)}, "bias": jnp.zeros((1, 10))}


def start():
    return jpeft.chain(jpeft.lora(rank=RANK, alpha=6), jpeft.unfreeze(targets="bias"))(weights())


def outputs(params):
    return jpeft.apply(model, params, X)


def steps(params, tx, state, n):
    """The tree and the state after `n` steps."""
    trainable, frozen = jpeft.partition(params)
    loss = lambda t: jnp.mean((outputs(jpeft.combine(t, frozen)) - Y) ** 2)
    for _ in range(n):
        with jax.numpy_dtype_promotion("standard"):  # Optax counts steps in integers
            updates, state = tx.update(jax.grad(loss)(trainable), state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    return jpeft.combine(trainable, frozen), state


@pytest.fixture
def trained():
    tx = optax.adam(1e-2)
    return steps(start(), tx, tx.init(jpeft.partition(start())[0]), 3)


def test_nothing_changes_at_a_restart(trained):
    params, state = trained
    after, _ = jax.jit(relora_restart)(params, state, key=jax.random.key(4))
    assert np.abs(outputs(params) - outputs(start())).max() > 0.1
    np.testing.assert_allclose(outputs(after), outputs(params), rtol=1e-5, atol=1e-5)
    for name in ("up", "down"):
        before, node = params[name]["kernel"], after[name]["kernel"]
        np.testing.assert_allclose(node.base, before.base + 3 * before.a @ before.b, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(after["bias"].array, params["bias"].array)


def test_the_term_starts_anew_and_trains(trained):
    """A is uniform and another one, B zero; B has a gradient then, and A has one step later."""
    params, state = trained
    after, state = relora_restart(params, state, key=jax.random.key(4))
    for name, width in (("up", 12), ("down", 16)):
        node, before = after[name]["kernel"], params[name]["kernel"]
        assert np.all(node.b == 0) and np.abs(node.a - before.a).max() > 0.1
        assert 0.8 * width**-0.5 < np.abs(node.a).max() <= width**-0.5
    later, _ = steps(after, optax.sgd(0.1), optax.sgd(0.1).init(jpeft.partition(after)[0]), 2)
    for name in ("up", "down"):
        node, before = later[name]["kernel"], after[name]["kernel"]
        assert np.all(node.b != before.b) and np.all(node.a != before.a)
        np.testing.assert_array_equal(node.base, before.base)


def test_moments_are_reset(trained):
    """Those of A and B; not those of the bias, and no count."""
    params, state = trained
    _, after = relora_restart(params, state, key=jax.random.key(4))
    assert after[0].count == state[0].count == 3
    for moments, before in ((after[0].mu, state[0].mu), (after[0].nu, state[0].nu)):
        np.testing.assert_array_equal(moments["bias"].array, before["bias"].array)
        for name in ("up", "down"):
            node, old = moments[name]["kernel"], before[name]["kernel"]
            assert np.any(old.a) and np.any(old.b)
            assert not np.any(node.a) and not np.any(node.b)


def test_moments_in_groups_are_reset():
    """Where an optimizer has moments of a part of the tree."""
    is_node = lambda x: isinstance(x, jpeft.Node)
    mark = lambda x: jax.tree.map(lambda _: "lora" if isinstance(x, jpeft.LoRA) else "rest", x)
    groups = lambda tree: jax.tree.map(mark, tree, is_leaf=is_node)
    tx = optax.partition({"lora": optax.adam(1e-2), "rest": optax.adam(1e-3)}, groups)
    params, state = steps(start(), tx, tx.init(jpeft.partition(start())[0]), 2)
    _, after = relora_restart(params, state, key=jax.random.key(4))
    nonzero = lambda state, group: [bool(np.any(x)) for x in jax.tree.leaves(state.inner_states[group])]
    assert nonzero(state, "lora") == [True] * 9
    assert nonzero(after, "lora") == [True] + [False] * 8
    assert nonzero(after, "rest") == [True] * 3


@pytest.mark.parametrize("prune", [0.0, 0.75, 0.9])
def test_moments_are_pruned_by_magnitude(trained, prune):
    params, state = trained
    _, after = relora_restart(params, state, key=jax.random.key(4), prune=prune)
    before, left = (s[0].mu["up"]["kernel"].b for s in (state, after))
    size = np.sort(np.abs(before).ravel())
    dropped = round(prune * size.size)
    np.testing.assert_array_equal(left, np.where(np.abs(before) >= size[dropped], before, 0))


def test_the_rank_grows():
    """Of all that has changed: r, 2 r, 3 r. Never more than r without restarts."""
    tx = optax.adam(3e-2)
    params = start()
    state = tx.init(jpeft.partition(params)[0])
    ranks = []
    for n in range(3):
        params, state = steps(params, tx, state, 6)
        change = jpeft.merge(params)["up"]["kernel"] - weights()["up"]["kernel"]
        ranks.append(int(np.linalg.matrix_rank(change, tol=1e-3)))
        params, state = relora_restart(params, state, key=jax.random.key(n))
    assert ranks == [RANK, 2 * RANK, 3 * RANK]


def test_stacked_and_boxed_kernels():
    """Every layer gets an A of its own, and a box stays one."""
    box = nn.Partitioned(normal(5, 3, 8, 6), (None, None, "model"))
    node = jpeft.lora({"w": box}, rank=2, targets={"w": "sio"})["w"]
    node = node.replace(b=normal(6, 3, 2, 6))
    after, _ = relora_restart({"w": node}, optax.EmptyState(), key=jax.random.key(7))
    np.testing.assert_allclose(after["w"].base.value, box.value + node.a @ node.b, rtol=1e-5, atol=1e-5)
    assert after["w"].base.names == box.names
    assert len(np.unique(after["w"].a)) == after["w"].a.size


def test_bfloat16_loses_what_is_small():
    """Below half a unit in the last place of the base: a documented bound. A float32 base keeps it."""
    lost = {}
    for dtype in (jnp.bfloat16, jnp.float32):
        node = jpeft.lora({"w": jnp.ones((8, 8), dtype)}, rank=1, targets="w")["w"]
        node = node.replace(a=jnp.full((8, 1), 1e-3), b=jnp.ones((1, 8)))
        after, _ = relora_restart({"w": node}, optax.EmptyState(), key=jax.random.key(7))
        assert after["w"].base.dtype == dtype and after["w"].a.dtype == jnp.float32
        lost[dtype] = float(jnp.abs(after["w"].base.astype(jnp.float32) - 1.001).max())
    assert 9e-4 < lost[jnp.bfloat16] <= 2.0**-9 and lost[jnp.float32] < 1e-6


def test_a_checkpoint_tells_that_the_base_has_moved(trained, tmp_path):
    params, state = relora_restart(*trained, key=jax.random.key(4))
    params, _ = steps(params, optax.adam(1e-2), state, 2)
    jpeft.save(tmp_path / "adapter", params)
    with pytest.raises(jpeft.BaseMismatchError, match="2 of 3 parameters"):
        jpeft.restore(tmp_path / "adapter", weights())
    back = jpeft.restore(tmp_path / "adapter", jpeft.strip(params))
    np.testing.assert_array_equal(outputs(back), outputs(params))


def test_schedule():
    """By hand: a cosine from the first warmup on, and ten steps after a restart its value from zero on."""
    schedule = relora_schedule(
        2.0, total_steps=100, restart_every=40, warmup_steps=5, restart_warmup_steps=10, end_value=0.5
    )
    cosine = lambda t: 0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi * (t - 5) / 95))
    with jax.numpy_dtype_promotion("standard"):  # Optax counts steps in integers
        found = jax.vmap(schedule)(jnp.arange(101))
    want = [2 * t / 5 if t < 5 else cosine(t) for t in range(101)]
    for restart in (40, 80):
        want[restart : restart + 10] = [k / 10 * cosine(restart + 10) for k in range(10)]
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


def test_refuses():
    with pytest.raises(ValueError, match="no LoRA node in this tree"):
        relora_restart(weights(), optax.EmptyState(), key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"`prune` is 1\.5"):
        relora_restart(start(), optax.EmptyState(), key=jax.random.key(0), prune=1.5)
    quantized = jpeft.chain(jpeft.nf4(), jpeft.lora(rank=2))(weights())
    with pytest.raises(ValueError, match=r"(?s)down/kernel: NF4.*up/kernel: NF4"):
        relora_restart(quantized, optax.EmptyState(), key=jax.random.key(0))
    with pytest.raises(ValueError, match="restart_warmup_steps=40"):
        relora_schedule(1.0, total_steps=100, restart_every=40, restart_warmup_steps=40)


def test_every_matrix_of_a_stack_keeps_its_share_of_moments():
    params = jpeft.lora({"kernel": normal(0, 3, 8, 6)}, rank=2, targets={"kernel": "sio"})
    moments = optax.adam(1e-2).init(jpeft.partition(params)[0])
    size = jnp.array([1.0, 10, 100])[:, None, None]
    filled = lambda x: jnp.arange(1.0, 1.0 + x[0].size).reshape(1, *x[0].shape) * size if x.ndim else x
    moments = jax.tree.map(filled, moments)
    _, state = relora_restart(params, moments, key=jax.random.key(1), prune=0.75)
    for moment in (state[0].mu["kernel"], state[0].nu["kernel"]):
        np.testing.assert_array_equal(jnp.count_nonzero(moment.a, axis=(1, 2)), [4, 4, 4])
        np.testing.assert_array_equal(jnp.count_nonzero(moment.b, axis=(1, 2)), [3, 3, 3])
