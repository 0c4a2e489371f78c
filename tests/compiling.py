"""Programs that are run once: they are to be compiled quickly, not well."""

import functools

import jax


jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
