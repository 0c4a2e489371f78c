"""CPT: at the start the examples themselves, near them ever after."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.testing import subject


EXAMPLES = [3, 9, 11, 5, 30, 9, 13, 5, 31]
TYPES = [0, 1, 2, 3, 4, 5, 6, 7, 8]
MOVES = [1, 2, 3, 5, 6, 7]
IDS = jax.random.randint(jax.random.key(1), (2, 6), 0, 32)
MASK = jnp.ones((2, 6), jnp.int32).at[1, :2].set(0)


def close(found, want, tolerance=1e-5):
    np.testing.assert_allclose(found, want, rtol=0, atol=tolerance * np.abs(want).max())


def front(x, columns):
    columns = jnp.asarray(columns, x.dtype)
    return jnp.concatenate([jnp.broadcast_to(columns[None], (len(x), len(columns))), x], axis=1)


def made(**options):
    return jpeft.cpt(subject("decoder").params, **{"ids": EXAMPLES, "types": TYPES} | options)


def logits(params, **options):
    return jpeft.apply(subject("decoder").model, {"params": params}, IDS, MASK, **options)


def test_starts_as_learning_in_context():
    plain = subject("decoder")
    want = plain.model.apply({"params": plain.params}, front(IDS, EXAMPLES), front(MASK, [1] * len(EXAMPLES)))
    close(logits(made()), want[:, len(EXAMPLES) :])
    close(logits(made(), keep_prompt=True), want)


def test_other_prompts_are_kept_too():
    model = subject("decoder")
    params = jpeft.prompt(made(), length=2, init=[1, 2])
    want = model.model.apply({"params": model.params}, front(IDS, [*EXAMPLES, 1, 2]))
    found = jpeft.apply(model.model, {"params": params}, IDS, keep_prompt=True)
    close(found, want)
    labels = jpeft.apply(model.model, {"params": params}, IDS, labels=IDS, keep_prompt=True)
    assert labels.shape == found.shape[:2] and not labels[:, : len(EXAMPLES)].any()


def test_labels_have_no_change():
    node = made()["embed"]["prompt"]
    moved = node.replace(delta=jnp.ones_like(node.delta)).prompt(None) - node.rows
    assert node.delta.shape == (len(MOVES), 16)
    np.testing.assert_array_equal(np.flatnonzero(np.any(moved != 0, axis=1)), MOVES)


@pytest.mark.parametrize("rate", [1e-4, 10.0])
def test_steps_stay_within_the_bounds(rate):
    """Those of inputs and of templates are two; what is within them goes as it would."""
    trainable, frozen = jpeft.partition(made(epsilon=0.3, format_epsilon=0.6))

    def loss(trainable):
        params = jpeft.combine(trainable, frozen)
        return jpeft.cpt_loss(params, logits(params, keep_prompt=True), IDS, decay=0.9)

    tx = optax.chain(optax.adamw(rate), jpeft.optim.keep_bounded())
    free = optax.adamw(rate)
    state, slope = tx.init(trainable), jax.jit(jax.value_and_grad(loss))
    root = (16 / 2048) ** 0.5
    bounds = root * np.array([0.6, 0.3, 0.6, 0.6, 0.3, 0.6])
    values = []
    for n in range(5):
        value, grads = slope(trainable)
        with jax.numpy_dtype_promotion("standard"):  # Optax counts steps in integers
            updates, state = tx.update(grads, state, trainable)
            if n == 0:
                unbound, _ = free.update(grads, free.init(trainable), trainable)
        if n == 0 and rate < 1:
            close(updates["embed"]["prompt"].delta, unbound["embed"]["prompt"].delta, 1e-6)
        trainable = optax.apply_updates(trainable, updates)
        values.append(value)
    length = np.linalg.norm(trainable["embed"]["prompt"].delta, axis=1)
    assert np.all(length <= bounds * (1 + 1e-5)) and np.all(length > 0)
    assert np.allclose(length, bounds, rtol=1e-5) == (rate > 1)
    assert values[-1] < values[0]


def test_loss_by_hand():
    """One label a row, of which the oldest counts least; what is ignored counts not at all."""
    params = made()
    scores = jax.random.normal(jax.random.key(2), (2, len(EXAMPLES) + 6, 32))
    labels = jnp.full((2, 6), -100).at[0, 3].set(7).at[1, 0].set(8)
    found = jpeft.cpt_loss(params, scores, labels, decay=0.5)
    logs = jax.nn.log_softmax(scores)
    total = 0.25 * (logs[0, 3, 30] + logs[1, 3, 30]) + 0.5 * (logs[0, 7, 31] + logs[1, 7, 31])
    total += logs[0, len(EXAMPLES) + 2, 7] + logs[1, len(EXAMPLES) - 1, 8]
    np.testing.assert_allclose(found, -total / 6, rtol=1e-5)


def test_bounds_go_with_other_parameters():
    """Their updates are as they were; without `CPT` there is nothing to keep."""
    tx = jpeft.optim.keep_bounded()
    params = jpeft.lora(made(), rank=2)
    trainable, _ = jpeft.partition(params)
    state, updates = tx.init(trainable), jax.tree.map(jnp.ones_like, trainable)
    kept, _ = jax.jit(tx.update)(updates, state, trainable)
    assert np.linalg.norm(kept["embed"]["prompt"].delta[0]) < 0.02
    others = lambda tree: jax.tree.leaves({name: x for name, x in tree.items() if name != "embed"})
    for x, y in zip(others(kept), others(updates), strict=True):
        np.testing.assert_array_equal(x, y)
    with pytest.raises(ValueError, match=r"no CPT node.*jpeft\.cpt"):
        tx.init(jpeft.prompt(subject("decoder").params))
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(updates, state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"types": [1, 2]}, "9 `ids` and 2 `types`"),
        ({"types": [4] * 9}, "`types` is"),
        ({"types": [-1] + [1] * 8}, "`types` is"),
        ({"epsilon": 0.0, "types": [1]}, "9 `ids` and 1 `types`.*epsilon=0.0"),
        ({"format_epsilon": -1.0}, "format_epsilon=-1.0"),
        ({"ids": [50] * 9}, "outside of the table's 32"),
        ({"ids": [], "types": []}, "`types` is"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        made(**options)


def test_loss_of_other_logits():
    with pytest.raises(ValueError, match=r"of all 15.*keep_prompt=True"):
        jpeft.cpt_loss(made(), logits(made()), IDS)
    with pytest.raises(ValueError, match="no CPT node"):
        jpeft.cpt_loss(subject("decoder").params, jnp.zeros((2, 6, 32)), IDS)
