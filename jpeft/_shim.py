"""All that jpeft knows of JAX's internals: how to evaluate an equation of a jaxpr, and the rules of a `custom_vjp`.

And what has to be said to its compilers, and where the service is found that its processes coordinate through.
"""

import ctypes
import signal
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import clusters, distributed
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend import core as jex


Literal = jex.Literal


def bind(eqn: Any, vals: list[Any], **changes: Any) -> list[Any]:
    """The outputs of `eqn`, with `vals` for its inputs, and `changes` of its parameters."""
    vals = [vary(x, _varying(v.aval)) for x, v in zip(vals, eqn.invars, strict=True)]
    params = eqn.primitive.get_bind_params(eqn.params | changes)
    with eqn.ctx.manager:
        if isinstance(params, dict):
            out = eqn.primitive.bind(*vals, **params)
        else:  # before JAX 0.10: functions apart
            out = eqn.primitive.bind(*params[0], *vals, **params[1])
    return list(out) if eqn.primitive.multiple_results else [out]


def varying(tree: Any) -> frozenset[str]:
    """The axes of a `shard_map` along which any array in `tree` is another one on every device, by its type."""
    return frozenset().union(*(_varying(jax.typeof(x)) for x in jax.tree.leaves(tree) if _is_array(x)))


def _varying(aval: Any) -> frozenset[str]:
    aval = getattr(aval, "mat", aval)  # since JAX 0.10
    return getattr(aval, "varying", None) or getattr(aval, "vma", frozenset())


def vary(tree: Any, axes: Collection[str]) -> Any:
    """`tree`, with arrays of types that vary along these axes of a `shard_map`, too."""

    def one(x):
        missing = {*axes} - varying(x)
        return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x

    return jax.tree.map(one, tree) if axes else tree


def custom_vjp_rules(eqn: Any) -> tuple[Callable, Callable, Callable[[], list[int | None]]]:
    """The rules of a `custom_vjp_call`: `fwd(*inputs) -> residuals + outputs`, `bwd(*residuals, *cts) -> cotangents`.

    The third tells, once `fwd` has run, for every residual that `bwd` expects which input it is, or `None` for the next
    of those that `fwd` returned.
    """
    subfuns = eqn.primitive.get_bind_params(eqn.params)["subfuns"]
    rules, avals = subfuns[1:], [v.aval for v in eqn.invars]

    def fwd(*vals):
        return rules[0].call_wrapped(*(x for v in vals for x in (v, True)))

    def bwd(*vals):
        cts = rules[1].call_wrapped(*vals)
        cts = cts[0] if isinstance(cts, tuple) else cts  # since JAX 0.11.2 with logs
        return [
            jnp.asarray(ct) if _is_array(ct) else jnp.zeros(a.shape, a.dtype)
            for ct, a in zip(cts, avals, strict=True)
        ]

    return fwd, bwd, lambda: eqn.params["out_trees"]()[2]


def scan_counts(params: Any) -> tuple[int, int]:
    """Of a `scan`'s parameters: how many of its inputs are constants, and how many are carried."""
    if "ft_in" in params:  # since JAX 0.11
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]


def row_major(x: jax.Array) -> jax.Array:
    """`x`, laid out row by row: of a Fourier transform's result in another layout, XLA for CPU fails."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def coordination() -> Any:
    """Of `jax.distributed`: the `client` of its service, and the `process_id` and `num_processes` of this program."""
    return distributed.global_state


def in_cluster() -> bool:
    """Whether JAX finds out by itself where the other processes are: on a TPU pod, in SLURM, under MPI."""
    kinds = (kind for kind in clusters.ClusterEnv._cluster_types if not kind.opt_in_only_method)
    return any(kind.is_env_present() for kind in kinds)


def take_sigterm_once() -> None:
    """From now on JAX's handler of SIGTERM runs once: the next SIGTERM ends the process, whatever it is doing.

    A handler of Python's would not run while a computation hangs. Where the C library has no such handlers, as on
    macOS, all of them go on being taken.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "sysv_signal"):
        for function in (libc.signal, libc.sysv_signal):
            function.argtypes, function.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        libc.sysv_signal(signal.SIGTERM, libc.signal(signal.SIGTERM, None))
        signal.siginterrupt(signal.SIGTERM, False)  # system calls are begun again, as before


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array)
