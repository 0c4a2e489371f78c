"""A train step compiled for devices that are not there, and the account of what it takes."""

import dataclasses
import math
import re
import resource
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import Mesh

from ..hf._load import model_sites, parameter_shapes
from ._collectives import Collective, collectives
from ._estimate import estimate
from ._step import BATCH, Step, abstract_step
from ._topology import PlanError, Topology


AXES = (*BATCH, "tensor")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one chip.

    **Fields:**

    - `base`, `adapters`, `optimizer`, `batch`: of the arrays' numbers, as the mesh divides them.
    - `layout`: what the compiler adds to them, to fill up its tiles.
    - `temporaries`: activations, gradients and all else that lives within a step.
    - `code`: of the program; 0 if the compiler has refused it.
    """

    base: int
    adapters: int
    optimizer: int
    batch: int
    layout: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """The sum of all."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a train step takes.

    **Fields:**

    - `topology`, `mesh`, `batch_size`, `length`: what was asked; the batch is that of all chips.
    - `memory`: on one chip; `hbm` is what a chip has, `estimate` what arithmetic alone expects.
    - `available`: what the compiler leaves to a program, where it has told: it does so when it refuses one.
    - `collectives`: of one chip in one step; `None` if the compiler has refused the program for its memory.
    - `seconds`, `host_bytes`: what compiling took, and the most that this process has held.
    """

    topology: str
    mesh: dict[str, int]
    batch_size: int
    length: int
    memory: Memory
    hbm: int
    estimate: int
    available: int | None
    collectives: tuple[Collective, ...] | None
    seconds: float
    host_bytes: int

    @property
    def fits(self) -> bool:
        """Whether the compiler has taken it, and a chip has the memory."""
        return self.collectives is not None and self.memory.total <= self.hbm

    @property
    def missing(self) -> int:
        """Bytes by which a chip is too small; 0 where it is not."""
        return max(0, self.memory.total - (self.available or self.hbm))

    def json(self) -> dict[str, Any]:
        """All of it, as JSON takes it."""
        rest = {"total": self.memory.total, "fits": self.fits, "missing": self.missing}
        calls = None if self.collectives is None else [x._asdict() for x in self.collectives]
        return dataclasses.asdict(self) | {"collectives": calls} | rest


def plan(
    architecture: Any,
    fields: Mapping[str, Any],
    transform: Callable[[Any], Callable],
    topology: Topology,
    *,
    mesh: Mapping[str, int] | None = None,
    batch_size: int | None = None,
    length: int = 2048,
    remat: str | None = "full",
    dtype: Any = "bfloat16",
    adapter_sharding: str = "tensor",
) -> Plan:
    """Compile a train step of a decoder for a topology; of abstract values: no array is made, no weight read.

    Args:
      architecture: as `jpeft.hf` describes a `config.json`.
      fields: of the `config.json`.
      transform: of the model's `jpeft.Sites`, a transform that waits for its tree.
      mesh: sizes of the axes data, fsdp and tensor; one that is left out is 1. By default weights are divided (fsdp)
        over as few chips as leave seven eighths of the memory to other things, and copied over the rest (data).
      batch_size: rows of a step, on all chips; by default one a chip and its tensor-parallel fellows.
      length: tokens of a row.
      remat: what `jpeft.models.Decoder` takes; the layers are scanned.
      dtype: of parameters and activations.
      adapter_sharding: what `jpeft.shardings` takes.

    Raises a PlanError where there is no compiler, and for a mesh or a batch that the chips do not divide.
    """
    jax.config.update("jax_platforms", "cpu")  # what is computed on the way, such as a key, needs no device
    started = time.monotonic()
    dtypes = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}
    model = architecture.build(fields, scan=True, remat=remat, **dtypes)
    shapes = parameter_shapes(architecture, model)
    base = unflatten_dict(shapes, sep="/")
    change = transform(model_sites(architecture, model, shapes))
    if mesh is None:
        sizes = default_mesh(_bytes(jax.eval_shape(change, base)), topology)
    else:
        sizes = {axis: mesh.get(axis, 1) for axis in AXES}
    batch_size = batch_size or math.prod(sizes[axis] for axis in BATCH)
    _check(sizes, mesh or {}, topology, batch_size)
    devices = np.asarray(topology.devices())
    ordered = create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    named = Mesh(ordered, AXES)
    step = abstract_step(
        model, base, change, named, batch_size=batch_size, length=length, adapter_sharding=adapter_sharding
    )
    memory, available, calls = _compile(step)
    arrays = memory.total - memory.layout - memory.temporaries - memory.code
    return Plan(
        topology=str(topology), mesh=sizes, batch_size=batch_size, length=length, memory=memory, hbm=topology.hbm,
        estimate=estimate(model.config, arrays, memory.adapters, shapes, sizes, batch_size, length),
        available=available, collectives=calls, seconds=time.monotonic() - started,
        host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )  # fmt: skip


def default_mesh(weights: int, topology: Topology) -> dict[str, int]:
    """Weights, of so many bytes, divided over as few chips as leave seven eighths of their memory to other things."""
    parts = [n for n in range(1, topology.chips + 1) if topology.chips % n == 0]
    fsdp = next((n for n in parts if weights / n <= topology.hbm / 8), topology.chips)
    return {"data": topology.chips // fsdp, "fsdp": fsdp, "tensor": 1}


def _check(sizes: Mapping[str, int], given: Mapping[str, int], topology: Topology, batch_size: int) -> None:
    faults = [f"the mesh has no axis {axis!r}: there are {', '.join(AXES)}" for axis in given if axis not in AXES]
    if (size := math.prod(sizes.values())) != topology.chips:
        faults.append(f"the mesh {_mesh_text(sizes)} is of {size} chips, and {topology} has {topology.chips}")
    if batch_size % (parts := math.prod(sizes[axis] for axis in BATCH)):
        faults.append(f"{batch_size} rows cannot be divided over data x fsdp = {parts}: give a multiple of it")
    if faults:
        raise PlanError("; ".join(faults))


_REFUSALS = (
    r"HLO temporaries \((?P<temporaries>[\d.]+[KMGT]?)\) exceeds available HBM \((?P<limit>[\d.]+[KMGT]?)\)",
    r"Used (?P<total>[\d.]+[KMGT]?) of (?P<limit>[\d.]+[KMGT]?) hbm",
)


def _compile(step: Step) -> tuple[Memory, int | None, tuple[Collective, ...] | None]:
    """The memory, what of it is available if it is not enough, and the collectives if it is."""
    trained, state, frozen, tokens = map(_bytes, step[1:])
    own = {"base": frozen, "adapters": trained, "optimizer": state, "batch": tokens}
    try:
        compiled = step.lower().compile()
    except RuntimeError as error:
        found = next(filter(None, (re.search(pattern, str(error)) for pattern in _REFUSALS)), None)
        if "RESOURCE_EXHAUSTED" not in str(error) or found is None:
            raise
        sizes = {name: _parse_size(text) for name, text in found.groupdict().items()}
        temporaries = sizes.get("temporaries", sizes.get("total", 0) - sum(own.values()))
        return Memory(**own, layout=0, temporaries=temporaries, code=0), sizes["limit"], None
    took = compiled.memory_analysis()
    memory = Memory(
        **own, layout=max(0, took.argument_size_in_bytes - sum(own.values())),
        temporaries=took.temp_size_in_bytes + took.output_size_in_bytes - took.alias_size_in_bytes,
        code=took.generated_code_size_in_bytes,
    )  # fmt: skip
    return memory, None, tuple(collectives(compiled.as_text()))


def _parse_size(text: str) -> int:
    """Of `"18.31G"`, in bytes."""
    return int(float(text.rstrip("KMGT")) * 1024 ** " KMGT".find(text[-1])) if text[-1] in "KMGT" else int(text)


def _bytes(tree: Any) -> int:
    """Of abstract arrays, on one chip of those that divide them."""
    shape = lambda x: x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    return sum(math.prod(shape(x)) * jax.dtypes.itemsize_bits(x.dtype) // 8 for x in jax.tree.leaves(tree))


def _mesh_text(sizes: Mapping[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())
