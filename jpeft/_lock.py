"""One writer to a directory at a time."""

import json
import os
import secrets
import socket
import weakref
from pathlib import Path

from ._storage import CheckpointError


class Lock:
    """Held from when it is made until `release`, or the end of the process, however that comes.

    The operating system holds it (`flock`): what a process that was killed has left does not lock anything. Where a
    file system does not carry such locks from host to host, both get it, and `check` tells the one that came first.

    **Raises** `CheckpointError`, with the process that has it.
    """

    def __init__(self, file: Path):
        import fcntl  # Windows has none, and everything else of the package

        self.file = file
        self._stream = file.open("a+")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._stream.close()
            raise CheckpointError(
                f"{file.parent} is being written by another: {file.read_text() or 'a process that is just starting'}. "
                "Wait for it to end, end it, or name another directory; `read_only=True` restores from this one."
            ) from None
        except OSError:  # a file system without locks
            pass
        holder = {"host": socket.gethostname(), "process": os.getpid(), "nonce": secrets.token_hex(8)}
        self._content = json.dumps(holder)
        self._stream.truncate(0)
        self._stream.write(self._content)
        self._stream.flush()
        stream = weakref.ref(self._stream)  # a forked child has the lock, too, and may outlive this process
        os.register_at_fork(after_in_child=lambda: stream() and stream().close())

    def check(self) -> None:
        """**Raises** `CheckpointError` if another has taken the directory all the same."""
        now = self.file.read_text() if self.file.exists() else "no process: the file is gone"
        if now != self._content:
            raise CheckpointError(f"Nothing is written: {self.file} names {now}, not this process, {self._content}.")

    def release(self) -> None:
        self._stream.close()
