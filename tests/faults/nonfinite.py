"""NaN and infinities at every step and in every array of the gradients, and in the loss: none of them changes anything.

    python tests/faults/nonfinite.py --steps 50

Every optimizer, within `jpeft.optim.skip_nonfinite`, trains a small model. Before each step come the bad ones: one
entry of one array of the gradients, or the loss, is not a finite number. After each, all parameters and all of the
inner state must have the bits that they had, and the counts must be right; after so many in a row `check_finite` must
raise, and not before. In the end the run must be, bit by bit, the one without bad steps.
"""

import argparse
import itertools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from small_runs import SETUPS, TRANSITIONS, Rows, Training, digest

from jpeft.optim import NonFiniteError, check_finite, skip_nonfinite


BAD = (np.nan, np.inf, -np.inf)
NAMES = [name for name in SETUPS if not name.startswith("method:") and name not in TRANSITIONS]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--count", type=int, help="bad steps before each of them; by default every array and number")
    parser.add_argument("--limit", type=int, default=5, help="in a row, after which `check_finite` must raise")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    options = parser.parse_args(argv)
    failed = 0
    for name in options.only:
        began = time.perf_counter()
        try:
            told = check(name, options.steps, options.count, options.limit)
        except AssertionError as error:
            failed, told = failed + 1, f"FAILED: {error}"
        print(f"{name}: {told}, {time.perf_counter() - began:.0f} s", flush=True)
    print(f"optimizers: {len(options.only)}, faults: {failed}")
    return min(failed, 1)


def check(name: str, steps: int, count: int | None, limit: int) -> str:
    """Raises `AssertionError` for the first violation."""
    setup = SETUPS[name]
    training = Training(setup._replace(tx=lambda subject: skip_nonfinite(setup.tx(subject))))
    rng, rows, cases = np.random.default_rng(0), Rows(), 0

    start = state = plain = training.start()
    for n in range(steps):
        value, grads = training.slope(state.params, next(rows), n)
        bits, in_a_row = digest((state.params, state.opt_state.inner)), 0
        for where, bad in _cases(grads, count, rng):
            state = training.update(state, *_poisoned(value, grads, where, bad, rng))
            cases, in_a_row = cases + 1, in_a_row + 1
            at = f"step {n}, {bad} in {where or 'the loss'}"
            assert digest((state.params, state.opt_state.inner)) == bits, f"{at}: parameters or state have changed"
            found = int(state.opt_state.skipped), int(state.opt_state.in_a_row)
            assert found == (cases, in_a_row), f"{at}: counted {found}, not {(cases, in_a_row)}"
            assert _raises(state.opt_state, limit) == (in_a_row >= limit), f"{at}: check_finite after {in_a_row}"
        state, plain = (training.update(x, value, grads) for x in (state, plain))
        assert int(state.opt_state.in_a_row) == 0, f"step {n}: a finite step was skipped"
    begun, end, other = (digest((x.params, x.opt_state.inner)) for x in (start, state, plain))
    assert end == other != begun and cases, "the run is not the one without bad steps"
    return f"{steps} steps, {cases:,} bad ones between them, nothing changed"


def _cases(grads, count: int | None, rng: np.random.Generator) -> list[tuple[str, float]]:
    """Where there is which number: `""` is the loss. All, or so many of them by chance."""
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(grads)]
    every = list(itertools.product(["", *names], BAD))
    return every if count is None else [every[i] for i in rng.choice(len(every), count, replace=False)]


def _poisoned(value, grads, where: str, bad: float, rng: np.random.Generator):
    """The loss and the gradients, with one number in one of them, anywhere in it."""
    if not where:
        return jnp.full_like(value, bad), grads

    def one(path, x):
        if jax.tree_util.keystr(path) != where:
            return x
        x = np.array(x)
        x.flat[rng.integers(x.size)] = bad
        return jnp.asarray(x)

    return value, jax.tree_util.tree_map_with_path(one, grads)


def _raises(opt_state, limit: int) -> bool:
    try:
        check_finite(opt_state, limit=limit)
    except NonFiniteError:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
