"""The methods and bases that the command offers: names of functions that return a jpeft transform."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jpeft
from jpeft._targets import kernels, named_leaves
from jpeft.cli._arguments import Arguments
from jpeft.cli._errors import UserError, check_choice
from jpeft.cli._task import Task


Transform = Callable[..., Any]  # (params, *, key) -> params

BASES: dict[str, Callable[..., Transform] | None] = {
    "float": None,
    "int8": jpeft.int8,
    "int4": jpeft.int4,
    "nf4": jpeft.nf4,
}


@dataclasses.dataclass(frozen=True)
class Method:
    """What the command has to know of a method.

    **Fields:**

    - `make`: the transform.
    - `classification`, `causal`: learning rates for tasks of that kind.
    - `base`: how frozen kernels are kept, `rank`: what is used, where the user does not say.
    - `frees`: whether it lets kernels train, which must not be quantized then.
    - `before`: whether it puts `--prompt-length` places before every row: its second sample would have none of them.
    - `scans`: whether the layers may be stacked: of a stack no part can be quantized, and another train.
    - `peft`: whether its adapters have a form in PEFT.
    """

    make: Callable[[Arguments, Task], Transform]
    classification: float
    causal: float
    base: str = "nf4"
    rank: int = 8
    frees: bool = False
    before: bool = False
    scans: bool = True
    peft: bool = False


def _scaled(fn: Callable[..., Transform]) -> Callable[[Arguments, Task], Transform]:
    return lambda a, task: fn(rank=a.rank, alpha=a.alpha, sites=task.sites)


def _ranked(fn: Callable[..., Transform]) -> Callable[[Arguments, Task], Transform]:
    return lambda a, task: fn(rank=a.rank, sites=task.sites)


def _sited(fn: Callable[..., Transform]) -> Callable[[Arguments, Task], Transform]:
    return lambda a, task: fn(sites=task.sites)


def _long(fn: Callable[..., Transform]) -> Callable[[Arguments, Task], Transform]:
    return lambda a, task: fn(length=a.prompt_length, within=task.within)


def _inside(task: Task, pattern: str) -> str:
    return f"{task.within}/{pattern}" if task.within else pattern


METHODS = {
    # The rates for classification were found by 60 steps of the default task.
    "lora": Method(_scaled(jpeft.lora), 1e-3, 2e-4, peft=True),
    "bitfit": Method(lambda a, task: jpeft.bitfit(targets=_inside(task, ".*bias")), 4e-3, 1e-3),
    "norms": Method(lambda a, task: jpeft.norms(), 4e-3, 1e-3, peft=True),
    "last-layers": Method(lambda a, task: jpeft.last_layers(k=a.layers), 5e-4, 2e-5, frees=True, scans=False),
    "bottleneck": Method(lambda a, task: jpeft.bottleneck(width=a.width, sites=task.sites), 3e-3, 1e-3),
    "prompt": Method(_long(jpeft.prompt), 1e-2, 1e-2, before=True, peft=True),
    # Untested, like all rates for causal models: of the papers, of PEFT's examples, or of a like method.
    "full": Method(lambda a, task: jpeft.unfreeze(targets=_inside(task, ".*")), 5e-5, 1e-5, "float", frees=True),
    "dora": Method(_scaled(jpeft.dora), 1e-3, 2e-4, peft=True),
    "pissa": Method(_scaled(jpeft.pissa), 3e-4, 2e-5, peft=True),
    "olora": Method(_scaled(jpeft.olora), 3e-4, 2e-5, peft=True),
    "vera": Method(_ranked(jpeft.vera), 1e-2, 4e-3, rank=256, peft=True),
    "loha": Method(_scaled(jpeft.loha), 1e-3, 3e-4, peft=True),
    "lokr": Method(_scaled(jpeft.lokr), 1e-3, 3e-4, peft=True),
    "hira": Method(_ranked(jpeft.hira), 2e-3, 1e-3, rank=32, peft=True),
    "hra": Method(_ranked(jpeft.hra), 1e-3, 1e-3, peft=True),
    "oft": Method(lambda a, task: jpeft.oft(block=a.block or 32, sites=task.sites), 1e-3, 4e-4, peft=True),
    "boft": Method(lambda a, task: jpeft.boft(block=a.block or 4, sites=task.sites), 1e-3, 4e-4, peft=True),
    "miss": Method(_ranked(jpeft.miss), 1e-3, 2e-4, rank=64, peft=True),
    "ia3": Method(_sited(jpeft.ia3), 8e-3, 3e-3, peft=True),
    "beft": Method(_sited(jpeft.beft), 4e-3, 1e-3, peft=True),
    "ptuning": Method(_long(jpeft.ptuning), 1e-3, 1e-3, before=True, peft=True),
    "prefix": Method(
        lambda a, task: jpeft.prefix(length=a.prompt_length, sites=task.sites), 1e-2, 1e-2, before=True, peft=True
    ),
}


def resolve(arguments: Arguments, task: type[Task]) -> Arguments:
    """The arguments with the defaults of their method and of their kind of task.

    Raises a UserError, with the nearest names, for a method or base that there is not.
    """
    check_choice("method", arguments.method, METHODS)
    method = METHODS[arguments.method]
    base = arguments.base or method.base
    check_choice("base", base, BASES)
    defaults = {name: x for name, x in task.defaults.items() if getattr(arguments, name) is None}
    rank = arguments.rank or method.rank
    return dataclasses.replace(
        arguments,
        **defaults,
        base=base,
        rank=rank,
        alpha=arguments.alpha or 2.0 * rank,
        learning_rate=arguments.learning_rate or getattr(method, task.kind),
    )


def check_length(arguments: Arguments, positions: int) -> None:
    """Raises a UserError for rows that, with what the method puts before them, have more places than the model."""
    before = arguments.prompt_length if METHODS[arguments.method].before else 0
    if arguments.max_length + before > positions:
        sum_ = f"--max-length {arguments.max_length}" + (f" + --prompt-length {before}" if before else "")
        raise UserError(f"{sum_} is more than the model's {positions} positions")


def quantizer(base: str, sites: jpeft.Sites) -> Transform:
    """What quantizes every kernel that is no output head and no node; it raises a ValueError where there is none."""

    def quantize(params: Any, *, key: Any = None) -> Any:
        leaves = named_leaves(params)
        plain = [name for name in kernels(params, None, sites) if not isinstance(leaves[name], jpeft.Node)]
        if not plain:
            raise ValueError(f"the method trains every kernel and leaves none to --base {base}: use --base float")
        return BASES[base](params, targets=lambda name, _: name in plain, sites=sites)

    return jpeft.chain() if BASES[base] is None else quantize


def transform(arguments: Arguments, task: Task) -> Transform:
    """What turns a task's parameters into those to train: quantized, with the method, and a head that trains."""
    method = METHODS[arguments.method]
    base = jpeft.chain() if task.quantized else quantizer(arguments.base, task.sites)
    steps = [base, method.make(arguments, task)]
    return jpeft.chain(jpeft.chain(*(reversed(steps) if method.frees else steps)), task.head())
