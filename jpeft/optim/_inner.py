"""Optax's transforms within ours."""

import jax
import optax


def lenient(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner` with JAX's standard promotion of dtypes: Optax divides by counts of steps, which strict rules refuse."""
    inner = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, **extra):
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)
