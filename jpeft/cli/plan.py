"""`jpeft plan`: does fine-tuning a model fit on a slice of a TPU pod, which need not be there?"""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import jpeft
from jpeft._summary import human
from jpeft.cli import _arguments
from jpeft.cli._causal import Causal
from jpeft.cli._errors import UserError, check_choice, one_line
from jpeft.cli._methods import resolve, transform
from jpeft.hf._load import describe
from jpeft.hf.architectures import decoders
from jpeft.plan import Plan, Topology, plan


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compile a train step for a slice of a TPU pod, without one, and tell whether it fits.

    Only the model's config.json is read. It takes a minute or some, and pip install "jpeft[tpu]".
    """

    model: Annotated[Path, tyro.conf.Positional]
    """Hugging Face directory of a causal model. Nothing but its config.json is read."""

    topology: str = "v5e:4x4"
    """The chips: v5e:16x16, v6e:4x4, v5p:2x4x4, or an accelerator type such as v5e-256; an unknown one lists all."""

    mesh: str | None = None
    """How they are divided: data=8,fsdp=8,tensor=4. By default weights over as few chips as they need, by fsdp."""

    method: str = "lora"
    """How to train, as for jpeft finetune; an unknown name lists all."""

    base: str | None = None
    """How the frozen kernels are kept: float, int8, int4 or nf4. By default as for jpeft finetune."""

    rank: int | None = None
    """lora and its like: the rank of the update. By default 8, or what suits the method."""

    batch_size: int | None = None
    """Rows of a step, on all chips together. By default one for each part that the batch is divided into."""

    length: int = 2048
    """Tokens of a row."""

    remat: str = "full"
    """What is kept of a layer's forward pass: none (all), full (its input), dots or dots_no_batch."""

    dtype: str = "bfloat16"
    """Of parameters and activations: float32 or bfloat16."""

    adapter_sharding: str = "tensor"
    """What divides adapters: tensor, the axes that do not divide the batch; inherit, all that divide their kernels."""

    target_config: Path | None = None
    """For GPUs, --topology cuda:1x1x8: a target configuration, the text that XLA writes of one."""

    json: bool = False
    """Write JSON instead of tables."""

    def check(self) -> None:
        """Raises a UserError for what makes no sense."""
        check_choice("remat", self.remat, ("none", "full", "dots", "dots_no_batch"))
        check_choice("dtype", self.dtype, ("bfloat16", "float32"))
        check_choice("adapter-sharding", self.adapter_sharding, ("tensor", "inherit"))
        least = {"length": 2, "batch_size": 1, "rank": 1}
        given = {name: getattr(self, name) for name in least}
        if bad := [f"{_arguments.option(n)} must be {least[n]} or more, not {x}" for n, x in given.items()
                   if x is not None and x < least[n]]:  # fmt: skip
            raise UserError("; ".join(bad))


def run(arguments: Arguments, console: Console) -> int:
    """Show the plan, and return the exit code: 0 if it fits, 1 if it does not.

    Raises a UserError for what the user can put right.
    """
    arguments.check()
    console.quiet = arguments.json
    sizes = None if arguments.mesh is None else parse_mesh(arguments.mesh)
    given = {name: getattr(arguments, name) for name in ("method", "base", "rank")}
    trained = resolve(_arguments.Arguments(**given), Causal)
    remat = None if arguments.remat == "none" else arguments.remat
    with one_line():
        target = arguments.target_config and arguments.target_config.read_text()
        topology = Topology.parse(arguments.topology, target)
        fields, architecture = describe(arguments.model)
        if fields["model_type"] not in decoders.ARCHITECTURES:
            raise UserError(f"{arguments.model} is no causal model: its model_type is {fields['model_type']}")
        with console.status(f"compiling for {topology}"):
            found = plan(
                architecture, fields, lambda sites: _transform(trained, sites), topology, mesh=sizes,
                batch_size=arguments.batch_size, length=arguments.length, remat=remat, dtype=arguments.dtype,
                adapter_sharding=arguments.adapter_sharding,
            )  # fmt: skip
    if arguments.json:
        print(json.dumps(found.json(), indent=2))
    else:
        _show(console, found)
    return 0 if found.fits else 1


def parse_mesh(text: str) -> dict[str, int]:
    """`"data=2,fsdp=8"` as a mapping. Raises a UserError for other texts."""
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if not size.isdecimal() or int(size) < 1 or axis in sizes:
            raise UserError(f"cannot read --mesh {text!r}: write it data=2,fsdp=8,tensor=1, each axis once")
        sizes[axis] = int(size)
    return sizes


def _transform(arguments: _arguments.Arguments, sites: jpeft.Sites) -> Any:
    return transform(arguments, SimpleNamespace(sites=sites, within="", quantized=False, head=jpeft.chain))


def _show(console: Console, found: Plan) -> None:
    mesh = ", ".join(f"{axis} {size}" for axis, size in found.mesh.items())
    title = f"{found.topology}, {mesh}: {found.batch_size} rows of {found.length} tokens"
    table = Table("on each chip", title=title, box=SIMPLE_HEAD)
    table.add_column("memory", justify="right")
    for name, size in dataclasses.asdict(found.memory).items():
        table.add_row(name, human(size))
    table.add_row("total", human(found.memory.total), style="bold")
    console.print(table)
    if found.collectives is not None:
        sent = Table("sent in a step", "of", title="Collectives", box=SIMPLE_HEAD)
        sent.add_column("count", justify="right")
        sent.add_column("bytes", justify="right")
        for x in found.collectives:
            sent.add_row(x.kind, x.dtype, f"{x.count:,}", human(x.bytes))
        console.print(sent)
    ratio = found.memory.total / found.estimate
    console.print(f"arithmetic alone expects {human(found.estimate)}: the compiler's is {ratio:.2f} times that")
    console.print(f"compiled in {found.seconds:.0f} s, with {human(found.host_bytes)} of memory here")
    if found.fits:
        console.print(f"it fits: {human(found.memory.total)} of {human(found.hbm)}", style="bold green")
        return
    console.print(f"it does not fit: {human(found.missing)} too much for {human(found.hbm)}", style="bold red")
    console.print(f"to try: {'; '.join(_remedies(found))}")


def _remedies(found: Plan) -> list[str]:
    """What makes the largest part smaller comes first."""
    data = found.mesh["data"] * found.mesh["fsdp"]
    rows = found.batch_size // data
    arrays = ["--base nf4, if it is not", "more fsdp in --mesh, which divides the weights"]
    work = ["a shorter --length", "more tensor in --mesh, which divides a layer's work", "--remat full, if it is not"]
    if rows > 1:
        work.insert(0, f"a smaller --batch-size: {data} is one row a chip")
    largest_first = arrays + work if found.memory.base > found.memory.temporaries else work + arrays
    return [*largest_first, "more chips, or larger ones"]
