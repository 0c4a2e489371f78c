"""What a call does: imports, files that it opens, code that it runs, memory and time that it takes."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path


# Of https://docs.python.org/3/library/audit_events.html: nothing that reads data has a need of these.
FORBIDDEN = (
    "import", "compile", "exec", "pickle.find_class", "marshal.loads", "socket.connect", "socket.bind",
    "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "ctypes.",
    "urllib.Request", "shutil.", "os.remove", "os.rename",
)  # fmt: skip


@dataclasses.dataclass
class Watched:
    """Of one call.

    **Fields:**

    - `faults`: audit events that no reading has a need of, and files that were opened out of the directory.
    - `seconds`: of the processor.
    - `peak`: bytes that the process' resident set was larger than before, at most.
    """

    faults: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    peak: int = 0


_now: tuple[Path, Watched] | None = None


def _hook(event: str, args: tuple) -> None:
    if _now is None:
        return
    directory, watched = _now
    if event == "open" and isinstance(args[0], str | bytes | Path):
        path = Path(args[0].decode() if isinstance(args[0], bytes) else args[0])
        if not path.absolute().is_relative_to(directory) and str(path) not in _sources():
            watched.faults.append(f"open {path}")
    elif event.startswith(FORBIDDEN):
        watched.faults.append(f"{event} {str(args)[:200]}")


def _sources() -> set[str | None]:
    """Files of what is imported already: tracebacks look lines up in them."""
    return {getattr(module, "__file__", None) for module in [*sys.modules.values()]}


sys.addaudithook(_hook)


@contextlib.contextmanager
def watching(directory: Path) -> Iterator[Watched]:
    """What happens within, where files of `directory` may be read and no other."""
    global _now
    watched = Watched()
    reset, before = _reset_peak(), _status("VmRSS")
    start = time.process_time()
    _now = directory.absolute(), watched
    try:
        yield watched
    finally:
        _now = None
        watched.seconds = time.process_time() - start
        watched.peak = _status("VmHWM") - before if reset else 0


def _reset_peak() -> bool:
    """Begin the count of the largest resident set anew; whether the system has that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int:
    """Bytes, of `/proc/self/status`."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
