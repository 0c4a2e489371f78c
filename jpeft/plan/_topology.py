"""Devices that are described, not there: slices of a TPU pod, and GPUs."""

import dataclasses
import math
import os
import re
import tempfile
from importlib import util
from pathlib import Path
from typing import Any

from jax.experimental.topologies import get_topology_desc


class PlanError(ValueError):
    """What keeps a step from being planned, and the remedy."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU.

    **Fields:**

    - `accelerator`: what the accelerator types of its slices begin with.
    - `hbm`: bytes of memory.
    - `cores`: how many of the cores that the number of an accelerator type counts are in a chip.
    - `slices`: the slices that there are, by their sides.
    """

    accelerator: str
    hbm: int
    cores: int
    slices: tuple[str, ...]


GIB = 2**30
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")

# HBM a chip and the slices: https://cloud.google.com/tpu/docs/v5e, /v5p and /v6e.
CHIPS = {
    "v5e": Chip("v5litepod", 16 * GIB, 1, _FLAT),
    "v5p": Chip("v5p", 95 * GIB, 2, _DEEP),
    "v6e": Chip("v6e", 32 * GIB, 1, _FLAT),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips, and how they are connected.

    **Fields:**

    - `kind`: `"v5e"`, ..., or `"cuda"`.
    - `shape`: the sides of the slice; for GPUs slices, hosts in one and GPUs in one.
    - `target`: for GPUs, the text of a target configuration, as XLA writes it.
    """

    kind: str
    shape: tuple[int, ...]
    target: str | None = None

    @classmethod
    def parse(cls, text: str, target: str | None = None) -> "Topology":
        """That of `"v5e:4x4"`, of an accelerator type such as `"v5e-16"`, or of `"cuda:1x1x8"` with a target.

        Raises a PlanError, with those that are known, for others.
        """
        kind, mark, rest = re.match(r"([a-z0-9]*)(.?)(.*)", text, re.DOTALL).groups()
        sides = [tuple(map(int, s.split("x"))) for s in CHIPS[kind].slices] if kind in CHIPS else []
        if mark == ":" and re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){1,2}", rest):
            shape = tuple(map(int, rest.split("x")))
            if kind == "cuda" and len(shape) == 3:
                if target is None:
                    raise PlanError("GPUs are told by a target configuration of XLA's: --target-config FILE")
                return cls(kind, shape, target)
            if shape in sides:
                return cls(kind, shape)
        elif mark == "-" and re.fullmatch(r"[1-9]\d{0,4}", rest):
            cores = int(rest)
            for shape in sides:
                if math.prod(shape) * CHIPS[kind].cores == cores:
                    return cls(kind, shape)
        known = "; ".join(f"{name}: {', '.join(chip.slices)}" for name, chip in CHIPS.items())
        raise PlanError(
            f"unknown topology {text!r}. Known are, written v5e:4x4, {known}; accelerator types, written v5e-16; and, "
            "with a target configuration, cuda:1x1x8"
        )

    def __str__(self):
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    @property
    def hbm(self) -> int:
        """Bytes of memory of a chip. Raises a PlanError for a target configuration that does not tell."""
        if self.kind in CHIPS:
            return CHIPS[self.kind].hbm
        if (found := re.search(r"\bdevice_memory_size:\s*(\d+)", self.target)) is None:
            raise PlanError("the target configuration does not tell its device_memory_size: it is none of XLA's")
        return int(found[1])

    def devices(self) -> Any:
        """Descriptions of the devices, for a compiler; no device is asked for.

        One process at a time may hold the compiler for TPUs: others wait. Raises a PlanError where it is not installed.
        """
        try:
            if self.kind == "cuda":
                how = {"target_config": self.target, "topology": "x".join(map(str, self.shape))}
                return get_topology_desc(platform="cuda", topology_name=how["topology"], **how).devices
            self._prepare()
            return get_topology_desc(platform="tpu", topology_name=str(self)).devices
        except RuntimeError as error:
            remedy = "" if self.kind in CHIPS else _of_gpus(str(error))
            raise PlanError(f"no compiler for {self}: {error}{remedy}") from error

    def _prepare(self) -> None:
        """What the compiler reads of its surroundings: of the machine, which has no TPU, it would ask the network."""
        if util.find_spec("libtpu") is None:
            raise PlanError('the compiler for TPUs is not installed: pip install "jpeft[tpu]"')
        chip = CHIPS[self.kind]
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"
        os.environ["TPU_ACCELERATOR_TYPE"] = f"{chip.accelerator}-{self.chips * chip.cores}"
        os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
        _wait_for_turn()


def _of_gpus(error: str) -> str:
    if "parse" in error:
        return "; it may be that of a later XLA: leave out the fields that this one does not know"
    return '; the compiler for GPUs comes with: pip install "jax[cuda13]"'


_turn: list[Any] = []  # the file that is locked, until the process ends


def _wait_for_turn() -> None:
    import fcntl

    if not _turn:
        file = (Path(tempfile.gettempdir()) / f"jpeft-plan-{os.getuid()}.lock").open("w")
        fcntl.flock(file, fcntl.LOCK_EX)
        _turn.append(file)
