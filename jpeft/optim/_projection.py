"""What GaLore, Fira and APOLLO share: optimizers whose moments are those of projected gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._kernel import fold, folded, unfold
from .._node import is_node, is_param, widened
from .._targets import Sites, Targets, kernels, name_of
from ..selective._unfreeze import Free
from ._inner import lenient


# Matrices `(stack..., small, large)` by the path of their array: the `(in, out)` of a kernel or, where `in` is the
# larger, its transpose. The smaller side is projected; in torch's `(out, in)` a square matrix is so from the right.
Matrices = dict[str, jax.Array]

TINY = 1e-8  # beside a norm that something is divided by, or that bounds another

# The update that a method makes of a gradient G, P, R and the inner optimizer's update of R, in two parts: the growth
# of the second can be limited.
Expand = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array | float, jax.Array | float]]


class ProjectedState(NamedTuple):
    """The state of an optimizer of projected gradients."""

    count: jax.Array
    inner: Any  # that of the inner optimizer, with R (stack..., rank, large) in place of a projected array
    projections: Matrices  # P (stack..., small, rank), where it is kept
    norms: Matrices  # of the last limited parts (stack...), where there is a limit


class Projection(NamedTuple):
    """How $P$ is chosen."""

    of: Callable[[Matrices, Matrices, jax.Array], Matrices]  # from gradients, the last P and the number of steps
    kept: bool  # whether the last P is a part of the state


def projected(
    learning_rate: optax.ScalarOrSchedule,
    projection: Projection,
    expand: Expand,
    *,
    rank: int,
    limit: float | None,
    inner: optax.GradientTransformation | None,
    weight_decay: float,
    targets: Targets | None,
    sites: Sites | None,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer in which `inner`, by default Adam, sees $R = P^T G$ in place of the gradient $G$ of every kernel."""
    if rank < 1:
        raise ValueError(f"There must be a rank of at least 1, not {rank}.")
    inner = optax.with_extra_args_support(inner or optax.scale_by_adam())

    def init(params):
        matrices = _matrices(params, _plan(params, targets, sites))
        ranks = {n: min(rank, m.shape[-2]) for n, m in matrices.items()}
        low = {n: jnp.zeros((*m.shape[:-2], ranks[n], m.shape[-1]), m.dtype) for n, m in matrices.items()}
        projections = {n: jnp.zeros((*m.shape[:-1], ranks[n]), m.dtype) for n, m in matrices.items()}
        norms = {n: jnp.full(m.shape[:-2], jnp.inf, jnp.float32) for n, m in matrices.items()}  # the first step is free
        kept, limits = projections if projection.kept else {}, {} if limit is None else norms
        return ProjectedState(jnp.zeros((), jnp.int32), inner.init(_put(params, low)), kept, limits)

    def update(updates, state, params=None, **extra):
        plan = _plan(updates, targets, sites)
        gradients = _matrices(updates, plan)
        projections = projection.of(gradients, state.projections, state.count)
        low = {n: jnp.swapaxes(projections[n], -1, -2) @ g for n, g in gradients.items()}
        outer, inner_state = inner.update(_put(updates, low), state.inner, None, **extra)
        arrays, changed, found, norms = _arrays(updates), _arrays(outer), {}, {}
        for n, g in gradients.items():
            part, limited = expand(g, projections[n], low[n], changed[n])
            if limit is not None:
                last = jnp.where(state.norms[n] > 0, state.norms[n], jnp.inf)  # zero, as of an idle expert, can grow
                limited, norms[n] = _limited(limited, limit * (last + TINY))
            found[n] = unfold(_oriented(part + limited, arrays[n], plan[n]), arrays[n].shape, plan[n])
        kept = projections if projection.kept else {}
        return _put(outer, found), ProjectedState(optax.safe_increment(state.count), inner_state, kept, norms)

    scaled = optax.GradientTransformationExtraArgs(init, update)
    decayed = optax.add_decayed_weights(weight_decay)
    return lenient(optax.chain(scaled, decayed, optax.scale_by_learning_rate(learning_rate)))


def singular(every: int) -> Projection:
    """The left singular vectors of the gradient, in the order of the singular values, anew every so many steps."""
    _check(every)

    def of(gradients, last, count):
        def anew():
            vectors = {n: jnp.linalg.svd(widened(g), full_matrices=False)[0] for n, g in gradients.items()}
            return {n: vectors[n][..., : p.shape[-1]].astype(p.dtype) for n, p in last.items()}

        return jax.lax.cond(count % every == 0, anew, lambda: last)

    return Projection(of, kept=True)


def random(every: int, rank: int, key: jax.Array) -> Projection:
    """$N(0, 1 / rank)$, drawn anew every so many steps; in between the key tells it, and nothing is kept."""
    _check(every)

    def of(gradients, last, count):
        keys = jax.random.split(jax.random.fold_in(key, count // every), len(gradients))
        shape = lambda g: (*g.shape[:-1], min(rank, g.shape[-2]))
        draw = lambda k, g: jax.random.normal(k, shape(g), g.dtype) * shape(g)[-1] ** -0.5
        return {n: draw(k, g) for k, (n, g) in zip(keys, gradients.items(), strict=True)}

    return Projection(of, kept=False)


def gains(update: jax.Array, gradient: jax.Array, axes: int | tuple[int, ...] = -2) -> jax.Array:
    """How much longer the update is than the gradient, channel by channel of the larger side, or as a whole."""
    return (norm(update, axes) / (norm(gradient, axes) + TINY)).astype(update.dtype)


def norm(x: jax.Array, axes: int | tuple[int, ...]) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(widened(x)), axis=axes, keepdims=True))


def _limited(x: jax.Array, bound: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Matrices, none longer than its bound, and how long they are."""
    length = norm(x, (-2, -1))
    bounded = jnp.minimum(length, bound[..., None, None])
    return x * (bounded / jnp.maximum(length, TINY)).astype(x.dtype), bounded[..., 0, 0]


def _check(every: int) -> None:
    if every < 1:
        raise ValueError(f"The projection changes every so many steps, at least 1, not {every}.")


def _plan(tree: Any, targets: Targets | None, sites: Sites | None) -> dict[str, str]:
    """The letters of the axes of the arrays that are projected, by the array's path."""
    plain = lambda x: x.array if isinstance(x, Free) else None if is_node(x) else x
    axes = kernels(jax.tree.map(plain, tree, is_leaf=is_param), targets, sites)
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_param)
    within = lambda path, x: (name_of((*path, *p)) for p, _ in jax.tree_util.tree_leaves_with_path(x))
    return {n: axes[name_of(path)] for path, x in leaves if name_of(path) in axes for n in within(path, x)}


def _arrays(tree: Any) -> dict[str, jax.Array]:
    return {name_of(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _put(tree: Any, found: dict[str, jax.Array]) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, x: found.get(name_of(path), x), tree)


def _matrices(tree: Any, plan: dict[str, str]) -> Matrices:
    arrays = _arrays(tree)
    return {n: _oriented(fold(arrays[n], axes), arrays[n], axes) for n, axes in plan.items()}


def _oriented(m: jax.Array, array: jax.Array, axes: str) -> jax.Array:
    """The matrices of a kernel so that their smaller side is first, or back."""
    d_in, d_out = folded(array.shape, axes)[-2:]
    return m if d_in <= d_out else jnp.swapaxes(m, -1, -2)
