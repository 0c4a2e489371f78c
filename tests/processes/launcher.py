"""Starts a program as several processes of one machine, which coordinate over loopback, and collects how they end."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).parents[2]
PR_SET_PDEATHSIG = 1


class End(NamedTuple):
    """How a process ended: its exit code, below zero for a signal; what it printed; and when, by `time.monotonic`."""

    code: int
    output: str
    time: float


class Processes:
    """`python program *arguments --coordinator host:port --processes n --process i`, for every i.

    A context manager: what still runs at its end is killed, and so it is when this process dies.

    **Arguments:**

    - `devices`: of CPU, in every process.
    - `directory`: an existing one, for their outputs, and for programs that are compiled once for all.
    """

    def __init__(self, program: Path, *arguments: object, count: int, devices: int = 1, directory: Path):
        address = f"127.0.0.1:{free_port()}"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(directory / "compiled")),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        environment.pop("XLA_FLAGS", None)
        self.outputs = [directory / f"output-{time.monotonic_ns()}-{i}.txt" for i in range(count)]
        self.processes = []
        for i, output in enumerate(self.outputs):
            own = ("--coordinator", address, "--processes", count, "--process", i)
            command = [sys.executable, __file__, program, *arguments, *own]  # see the end of this file
            with output.open("wb") as file:
                words = [str(word) for word in command]
                self.processes.append(subprocess.Popen(words, stdout=file, stderr=file, env=environment))

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def send(self, which: int, number: signal.Signals) -> None:
        self.processes[which].send_signal(number)

    def output(self, which: int) -> str:
        return self.outputs[which].read_text(errors="replace")

    def until(self, text: str, *, which: int = 0, timeout: float = 600) -> None:
        """Wait until a process has printed `text`; raises `RuntimeError` if it ends before, or takes longer."""
        limit = time.monotonic() + timeout
        while text not in self.output(which):
            if self.processes[which].poll() is not None or time.monotonic() > limit:
                raise RuntimeError(f"process {which} did not print {text!r}:\n{self.output(which)}")
            time.sleep(0.02)

    def wait(self, timeout: float = 600) -> list[End]:
        """How all of them ended; raises `TimeoutError` with what they printed if they do not."""
        limit, ends = time.monotonic() + timeout, {}
        while len(ends) < len(self.processes):
            for i, process in enumerate(self.processes):
                if i not in ends and process.poll() is not None:
                    ends[i] = time.monotonic()
            if time.monotonic() > limit:
                outputs = "\n".join(f"--- {i}\n{self.output(i)}" for i in range(len(self.processes)))
                raise TimeoutError(f"only the processes {sorted(ends)} have ended after {timeout} s:\n{outputs}")
            time.sleep(0.02)
        return [End(p.returncode, self.output(i), ends[i]) for i, p in enumerate(self.processes)]


def run(program: Path, *arguments: object, count: int, devices: int = 1, directory: Path) -> list[End]:
    """Start the processes, and wait; raises `RuntimeError` with what was printed unless all end with 0."""
    with Processes(program, *arguments, count=count, devices=devices, directory=directory) as processes:
        ends = processes.wait()
    if any(end.code for end in ends):
        outputs = "\n".join(f"--- {i}, exit code {end.code}\n{end.output}" for i, end in enumerate(ends))
        raise RuntimeError(f"{program} failed:\n{outputs}")
    return ends


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


if __name__ == "__main__":  # `python launcher.py program ...` is `python program ...` that dies with its parent
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
