"""How processes end: one that fails tells the others why, and they follow."""

import atexit
import functools
import os
import sys
import threading
import time
import traceback
from types import TracebackType
from typing import Any, NoReturn

from .._shim import coordination


PEER_FAILED = 69
"""The exit code of a process that ends because another failed; `EX_UNAVAILABLE` of sysexits.h."""
PREEMPTED = 75
"""The exit code of a program that has saved after a SIGTERM, and is to be started again; `EX_TEMPFAIL`."""
REASONS = "jpeft/failed/"  # in the service's table: why a process ended, by its number
INTERVAL = 1.0  # seconds between two looks there


def end_with_the_others() -> None:
    """From now on an exception of this process ends all of them, and one of another ends this."""
    stop = threading.Event()
    sys.excepthook = functools.partial(_fail, stop)
    atexit.register(stop.set)  # before JAX's own, which takes the service down
    threading.Thread(target=_watch, args=(coordination().client, stop), name="jpeft.distributed", daemon=True).start()


def _fail(
    stop: threading.Event, kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> NoReturn:
    """Say what happened, and go, without the orderly shutdown: it waits for processes that wait for this one."""
    stop.set()
    sys.__excepthook__(kind, error, trace)
    state = coordination()
    reason = "".join(traceback.format_exception_only(error)).strip()
    try:
        state.client.key_value_set(f"{REASONS}{state.process_id}", f"process {state.process_id} failed: {reason}")
    finally:  # the service may be gone
        _leave(1)


def _watch(client: Any, stop: threading.Event) -> None:
    own = coordination().process_id
    while not stop.wait(INTERVAL):
        try:
            reasons = [reason for key, reason in client.key_value_dir_get(REASONS) if key != f"{REASONS}{own}"]
        except Exception:  # the service is gone, and JAX ends the process
            return
        if reasons:
            print(f"process {own} ends: {'; '.join(reasons)}", file=sys.stderr)
            _leave(PEER_FAILED)


def _leave(code: int) -> NoReturn:
    """Exit once all know why, and not only that a connection is cut; process 0, which has the service, is the last."""
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(INTERVAL * (3 if coordination().process_id == 0 else 2))
    os._exit(code)
