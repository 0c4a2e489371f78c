"""Training runs of a small model: a method of every family, every optimizer, and what happens between steps.

Rows come in an order by chance, another in every epoch; of their tokens and of methods' inputs some are dropped.
"""

import functools
import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.append(str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from methods import METHODS

import jpeft
import jpeft.testing as laws
from jpeft import optim


KEY = jax.random.key  # of a number; none is made at import: that would start the backend
ROWS, BATCH, LENGTH, VOCABULARY = 20, 4, 6, 32


class State(NamedTuple):
    """What a run goes on from; `more` is what transitions between steps keep."""

    params: Any
    opt_state: Any
    more: Any = None


class Setup(NamedTuple):
    """A method, an optimizer, and a transition, `start(params)` and `next(state, grads, n)`, where there is one."""

    make: Callable[[laws.Subject], Any]
    tx: Callable[[laws.Subject], optax.GradientTransformation] = lambda subject: optax.adamw(1e-2)
    start: Callable[[Any], Any] | None = None
    next: Callable[[State, Any, int], State] | None = None
    model: str = "decoder"
    base: str = "float"

    @property
    def subject(self) -> laws.Subject:
        return laws.subject(self.model, scan=True, base=self.base)


class Training:
    """The steps of a setup."""

    def __init__(self, setup: Setup):
        self._setup, self._subject = setup, setup.subject
        self.tx = optax.with_extra_args_support(setup.tx(self._subject))
        self.slope = _slope(self._subject)
        self._update = jax.jit(self._updated)

    def start(self) -> State:
        params = self._setup.make(self._subject)
        more = self._setup.start(params) if self._setup.start else None
        return State(params, self.tx.init(jpeft.partition(params)[0]), more)

    def step(self, state: State, tokens: np.ndarray, n: int) -> State:
        """Step `n`, from 0 on, and what comes after it."""
        value, grads = self.slope(state.params, tokens, n)
        state = self.update(state, value, grads)
        return self._setup.next(state, grads, n) if self._setup.next else state

    def update(self, state: State, value: jax.Array, grads: Any) -> State:
        """What the optimizer makes of a loss and its gradients."""
        return state._replace(**self._update(state.params, state.opt_state, value, grads))

    def _updated(self, params: Any, opt_state: Any, value: jax.Array, grads: Any) -> dict[str, Any]:
        trainable, frozen = jpeft.partition(params)
        updates, opt_state = self.tx.update(grads, opt_state, trainable, value=value, frozen=frozen)
        return {"params": jpeft.combine(optax.apply_updates(trainable, updates), frozen), "opt_state": opt_state}


@functools.cache
def _slope(subject: laws.Subject) -> Callable[[Any, np.ndarray, int], tuple[jax.Array, Any]]:
    """The loss, how far the output is from a wave, and its gradient by what trains; compiled once for all."""

    def loss(trainable: Any, frozen: Any, tokens: jax.Array, n: jax.Array) -> jax.Array:
        keys = jax.random.split(jax.random.fold_in(KEY(1), n))
        tokens = jnp.where(jax.random.bernoulli(keys[0], 0.1, tokens.shape), 0, tokens)
        variables = {"params": jpeft.combine(trainable, frozen)}
        y = jpeft.apply(subject.model, variables, tokens, jnp.ones_like(tokens), rngs={"dropout": keys[1]})
        return jnp.mean((y - jnp.cos(jnp.arange(y.size)).reshape(y.shape)) ** 2)

    slope = jax.jit(jax.value_and_grad(loss))
    return lambda params, tokens, n: slope(*jpeft.partition(params), tokens, n)


class Rows:
    """Batches of random rows, for ever; `position` is where it is in them, and may be set."""

    def __init__(self, position: int = 0):
        self.position = position
        self._rows = np.random.default_rng(0).integers(VOCABULARY, size=(ROWS, LENGTH))

    def __next__(self) -> np.ndarray:
        epoch, index = divmod(self.position, ROWS // BATCH)
        self.position += 1
        order = np.random.default_rng((1, epoch)).permutation(ROWS)
        return self._rows[order[index * BATCH : (index + 1) * BATCH]]


def digest(tree: Any) -> str:
    """A hash of every bit in a tree, and of its names."""
    found = hashlib.sha256()
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        x = np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        found.update(f"{jax.tree_util.keystr(path)} {x.dtype} {x.shape}\n".encode() + x.tobytes())
    return found.hexdigest()


def _lora(subject: laws.Subject, **how: Any) -> Any:
    return jpeft.lora(subject.params, rank=4, dropout=0.2, sites=subject.sites, key=KEY(3), **how)


def _unfrozen(subject: laws.Subject) -> Any:
    return jpeft.unfreeze(subject.params, targets=".*/(kernel|scale)")


def _low(subject: laws.Subject) -> dict[str, Any]:
    return {"rank": 4, "every": 3, "sites": subject.sites}


def _mask(subject: laws.Subject) -> Any:
    of_kernel = lambda path, x: np.asarray(abs(x) > 0.1) if str(path[-1]) == "['kernel']" else None
    return jax.tree_util.tree_map_with_path(of_kernel, subject.params)


OPTIMIZERS = {
    "adamw": Setup(_lora),
    "adafactor": Setup(_lora, lambda s: optax.adafactor(1e-2, min_dim_size_to_factor=4)),
    "clipped_schedule": Setup(
        _lora, lambda s: optax.chain(optax.clip_by_global_norm(0.1), optax.lion(optax.cosine_decay_schedule(1e-2, 100)))
    ),
    "multi_steps": Setup(_lora, lambda s: optax.MultiSteps(optax.adamw(1e-2), 3).gradient_transformation()),
    "noise": Setup(_lora, lambda s: optax.chain(optax.add_noise(0.01, 0.5, KEY(5)), optax.adam(1e-2))),
    "skip_nonfinite": Setup(_lora, lambda s: optim.skip_nonfinite(optax.adamw(1e-2))),
    "lora_plus": Setup(_lora, lambda s: optim.lora_plus(optax.adamw(5e-3), ratio=4.0)),
    "lora_fa": Setup(lambda s: _lora(s, freeze_a=True), lambda s: optim.lora_fa(optax.adamw(3e-2))),
    "relora_schedule": Setup(
        _lora,
        lambda s: optax.adamw(
            optim.relora_schedule(1e-2, total_steps=200, restart_every=20, restart_warmup_steps=4)
        ),
    ),
    "scale_by_aged_adam": Setup(_lora, lambda s: optax.chain(optim.scale_by_aged_adam(), optax.scale(-1e-2))),
    "masked_updates": Setup(_unfrozen, lambda s: optim.masked_updates(optax.adamw(1e-2), _mask(s))),
    "galore": Setup(_unfrozen, lambda s: optim.galore(2e-2, **_low(s))),
    "fira": Setup(_unfrozen, lambda s: optim.fira(2e-2, **_low(s))),
    "apollo": Setup(_unfrozen, lambda s: optim.apollo(1e-2, scale=4.0, **_low(s))),
    "keep_bounded": Setup(
        lambda s: _row("cpt").make(s.params, s.sites, KEY(3)),
        lambda s: optax.chain(optax.adamw(1e-2), optim.keep_bounded()),
    ),
}


def _row(name: str) -> laws.Method:
    return next(method for method in METHODS if method.name == name)


def _method(row: laws.Method, base: str = "float") -> Setup:
    return Setup(lambda s: row.make(s.params, s.sites, KEY(3)), model=row.model, base=base)


def _adalora(total: int = 8) -> Setup:
    allocator = optim.rank_allocator(total_steps=total, target_rank=2)
    update = jax.jit(allocator.update)

    def allocated(state: State, grads: Any, n: int) -> State:
        params, more = update(state.params, grads, state.more)
        return state._replace(params=params, more=more)

    make = lambda s: jpeft.adalora(s.params, rank=4, dropout=0.2, sites=s.sites, key=KEY(3))
    return Setup(make, start=allocator.init, next=allocated)


def _every(period: int, moved: Callable[[Any, Any, jax.Array], tuple[Any, Any]], **setup: Any) -> Setup:
    """A transition after every so many steps: `moved(params, opt_state, its number)`."""
    moved = jax.jit(moved)

    def after(state: State, grads: Any, n: int) -> State:
        if (n + 1) % period:
            return state
        params, opt_state = moved(state.params, state.opt_state, jnp.int32((n + 1) // period))
        return state._replace(params=params, opt_state=opt_state)

    return Setup(next=after, **setup)


def _blocks(choose: Callable[[Any], jax.Array]) -> Setup:
    tx = optax.adamw(1e-2)
    moved = lambda params, opt_state, turn: optim.switch(params, opt_state, tx, layers=choose(turn))
    return _every(5, moved, make=lambda s: jpeft.blocks(s.params, layers=choose(0)), tx=lambda s: tx)


def _spiel() -> Setup:
    def moved(params, opt_state, turn):
        key = jax.random.fold_in(KEY(6), turn)
        scores = jax.tree.map(lambda x: jax.random.normal(key, x.shape), jpeft.strip(params))
        return optim.reselect(params, opt_state, scores, rate=0.3)

    tx = lambda s: optax.chain(optim.scale_by_aged_adam(), optax.scale(-1e-2))
    return _every(6, moved, make=lambda s: jpeft.spiel(s.params, density=0.2, sites=s.sites, key=KEY(3)), tx=tx)


def _restart(params, opt_state, turn):
    return optim.relora_restart(params, opt_state, key=jax.random.fold_in(KEY(6), turn), prune=0.9)


# What does not train by gradients changes, too.
TRANSITIONS = {
    "rank_allocator": _adalora(),
    "relora_restart": _every(7, _restart, make=_lora),
    "badam": _blocks(lambda turn: optim.badam(turn, laws.LAYERS)),
    "lisa": _blocks(lambda turn: optim.lisa(turn, laws.LAYERS, active=1)),
    "reselect": _spiel(),
}
QUANTIZED = {f"lora_on_{base}": Setup(_lora, base=base) for base in ("int8", "nf4")}
SETUPS = OPTIMIZERS | TRANSITIONS | QUANTIZED | {f"method:{row.name}": _method(row) for row in METHODS}
OF_FAMILIES = ("dora", "vera", "loha", "oft", "fourierft", "bitfit", "unfreeze", "diff_pruning", "ia3", "houlsby",
               "prompt", "prefix", "moe_lora", "unipelt")  # fmt: skip
FAMILIES = tuple(f"method:{name}" for name in OF_FAMILIES)
