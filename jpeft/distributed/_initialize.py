"""The start of a program of one or of many processes."""

import os
import socket
from typing import Any

import jax
from jax.experimental import multihost_utils

from .._shim import coordination, in_cluster, take_sigterm_once
from ._end import end_with_the_others
from ._together import barrier


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_timeout: int = 20,
    shutdown_timeout: int = 20,
    **options: Any,
) -> None:
    """`jax.distributed.initialize`, such that no process outlives another; before anything else is asked of JAX.

    With no arguments, on a TPU pod, in SLURM and under MPI, JAX finds the other processes. Anywhere else the program is
    of one process, and behaves the same.

    Where one process raises, it says so to the others, and all end within seconds, with the reason. Where one
    disappears, killed or with its machine, they end `heartbeat_timeout` later. (JAX's defaults let them wait for
    100 s, and after an exception for more than 300 s.) `PEER_FAILED` is the exit code of a process that ends because
    of another.

    A SIGTERM, which schedulers send before they take a machine, is a notice: `preempted` tells when to save. The second
    ends the process.

    **Arguments:**

    - `coordinator_address`, `num_processes`, `process_id`: `"host:port"` of process 0, how many there are, and which
      this one is, from 0.
    - `heartbeat_timeout`: seconds after which a process that is not heard of is given up.
    - `shutdown_timeout`: seconds that a process waits at its end for the others.
    - `options`: of `jax.distributed.initialize`; `initialization_timeout=300` is how long to wait for a late process.

    **Raises** `RuntimeError` if JAX is in use already, or another process does not come; `ValueError` for arguments
    that are missing.
    """
    given = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if num_processes in (None, 1) and not given and not in_cluster():
        address = f"127.0.0.1:{_free_port()}"
        coordinator_address, num_processes, process_id = address, 1, 0
        options |= {"coordinator_bind_address": address, "cluster_detection_method": "deactivate"}
    jax.distributed.initialize(
        coordinator_address,
        num_processes,
        process_id,
        heartbeat_timeout_seconds=heartbeat_timeout,
        shutdown_timeout_seconds=shutdown_timeout,
        **options,
    )
    take_sigterm_once()
    if coordination().num_processes > 1:
        end_with_the_others()
        # The first collective of CPUs fails if a process is 30 s late to it; later ones wait.
        barrier("start")
        multihost_utils.sync_global_devices("start")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
