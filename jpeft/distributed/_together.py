"""What all processes do at one point."""

from collections import Counter
from typing import Any

import jax
from jax.experimental import multihost_utils

from .._shim import coordination


PASSED: Counter[str] = Counter()  # how often a barrier was passed: the service takes a name once


def barrier(name: str, *, timeout: float = 3600) -> None:
    """Wait until every process has come here, through the service that coordinates them.

    No collective is run: those of CPUs wait 30 s for a late process, and no longer.

    **Raises** `RuntimeError` after `timeout` seconds, naming the processes that did not come.
    """
    client = coordination().client
    if client is not None:
        client.wait_at_barrier(f"jpeft/{name}/{PASSED[name]}", round(1000 * timeout))
        PASSED[name] += 1


def compile(fn: Any, *args: Any, **kwargs: Any) -> jax.stages.Compiled:
    """`fn.lower(*args, **kwargs).compile()`, `fn` from `jax.jit`, once every process has compiled.

    So that the first of them does not run into a collective long before the last. It takes arrays with the dtypes,
    shapes and shardings of the arguments.
    """
    compiled = fn.lower(*args, **kwargs).compile()
    barrier("compile")
    return compiled


def preempted(step: int) -> bool:
    """Whether a process was sent SIGTERM, and all have agreed to stop at this step: save, and exit with `PREEMPTED`.

    To be called by every process once in every step, with the step's number.
    """
    return multihost_utils.reached_preemption_sync_point(step)
