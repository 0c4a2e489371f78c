"""What every transform of updates does: it trains the small decoder, in one trace, and its state can be stored."""

import chex
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import jpeft
import jpeft.testing as laws
from jpeft import optim


SUBJECT = laws.subject("decoder", scan=True)


def unfrozen():
    return jpeft.unfreeze(SUBJECT.params, targets=".*/(kernel|scale)")


def lora(**how):
    return lambda: jpeft.lora(SUBJECT.params, rank=4, sites=SUBJECT.sites, **how)


LOW = {"rank": 4, "every": 3, "sites": SUBJECT.sites}
MASK = jax.tree_util.tree_map_with_path(
    lambda path, x: np.asarray(abs(x) > 0.1) if str(path[-1]) == "['kernel']" else None, SUBJECT.params
)
CASES = {
    "masked_updates": (unfrozen, lambda: optim.masked_updates(optax.adamw(1e-2), MASK)),
    "lora_plus": (lora(), lambda: optim.lora_plus(optax.adamw(5e-3), ratio=4.0)),
    "lora_fa": (lora(freeze_a=True), lambda: optim.lora_fa(optax.adamw(3e-2))),
    "galore": (unfrozen, lambda: optim.galore(optax.linear_schedule(2e-2, 1e-2, 10), **LOW)),
    "fira": (unfrozen, lambda: optim.fira(2e-2, **LOW)),
    "apollo": (unfrozen, lambda: optim.apollo(1e-2, scale=4.0, **LOW)),
    "apollo_mini": (unfrozen, lambda: optim.apollo(1e-2, scale=16.0, per="tensor", **LOW | {"rank": 1})),
}
STEPS = 8


class Run:
    """A training loop, that counts the traces of its update."""

    def __init__(self, tuned, tx):
        self.trainable, self.frozen = jpeft.partition(tuned)
        self.state, self.traces = tx.init(self.trainable), 0

        @jax.jit
        def update(grads, state, trainable, frozen):
            self.traces += 1
            updates, state = tx.update(grads, state, trainable, frozen=frozen)
            return optax.apply_updates(trainable, updates), state

        self.update = update

    def step(self):
        value, grads = SUBJECT.slope(self.trainable, self.frozen)
        self.trainable, self.state = self.update(grads, self.state, self.trainable, self.frozen)
        return float(value)


@pytest.mark.parametrize("name", CASES)
def test_it_trains_and_its_state_can_be_stored(name, tmp_path):
    tuned, tx = (make() for make in CASES[name])
    run = Run(tuned, tx)
    losses = [run.step() for _ in range(STEPS)]
    assert losses[-1] < 0.8 * losses[0], losses
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", run.state)
    with ocp.StandardCheckpointer() as checkpointer:
        back = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, run.trainable))
    chex.assert_trees_all_equal(back, run.state)
    chex.assert_trees_all_equal_dtypes(back, run.state)
    before = run.trainable
    run.step()
    expected, run.trainable, run.state = run.trainable, before, back
    run.step()
    chex.assert_trees_all_equal(run.trainable, expected)
    assert run.traces == 1


@pytest.mark.parametrize("name", CASES)
def test_a_bfloat16_tree_has_updates_of_its_dtypes(name):
    tuned, tx = (make() for make in CASES[name])
    trainable, frozen = jax.tree.map(lambda x: x.astype("bfloat16"), jpeft.partition(tuned))
    update = lambda t, f: tx.update(t, tx.init(t), t, frozen=f)
    updates, state = jax.eval_shape(update, trainable, frozen)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, trainable)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, jax.eval_shape(tx.init, trainable))
