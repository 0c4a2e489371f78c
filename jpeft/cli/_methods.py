"""The methods and bases that the command offers: names of functions that return a jpeft transform."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jpeft
from jpeft.cli._arguments import Arguments
from jpeft.cli._errors import UserError, check_choice


Transform = Callable[..., Any]  # (params, *, key) -> params


def _unquantized_kernel(path: str, leaf: Any) -> bool:
    return path.startswith("encoder/") and path.endswith("/kernel") and not isinstance(leaf, jpeft.Node)


BASES: dict[str, Callable[[], Transform]] = {
    "float": jpeft.chain,
    "int8": lambda: jpeft.int8(targets=_unquantized_kernel),
    "int4": lambda: jpeft.int4(targets=_unquantized_kernel),
    "nf4": lambda: jpeft.nf4(targets=_unquantized_kernel),
}

# What is to train must not be quantized: what unfreezes kernels comes before the base's quantization.
METHODS: dict[str, Callable[[Arguments, Transform], Transform]] = {
    "lora": lambda a, base: jpeft.chain(base, jpeft.lora(rank=a.rank, alpha=a.alpha)),
    "bitfit": lambda a, base: jpeft.chain(base, jpeft.bitfit(targets="encoder/.*bias")),
    "norms": lambda a, base: jpeft.chain(base, jpeft.norms()),
    "last-layers": lambda a, base: jpeft.chain(jpeft.last_layers(k=a.layers), base),
    "bottleneck": lambda a, base: jpeft.chain(base, jpeft.bottleneck(width=a.width)),
    "prompt": lambda a, base: jpeft.chain(base, jpeft.prompt(length=a.prompt_length, within="encoder")),
    "full": lambda a, base: jpeft.unfreeze(targets="encoder/.*"),
}

LEARNING_RATES = {
    "lora": 1e-3,
    "bitfit": 4e-3,
    "norms": 4e-3,
    "last-layers": 5e-4,
    "bottleneck": 3e-3,
    "prompt": 1e-2,
    "full": 5e-5,
}


def resolve(arguments: Arguments) -> Arguments:
    """The arguments with the method's defaults.

    Raises a UserError, with the nearest names, for a method or base that there is not, and for a quantized base of
    kernels that are to train.
    """
    check_choice("method", arguments.method, METHODS)
    full = arguments.method == "full"
    base = arguments.base or ("float" if full else "nf4")
    check_choice("base", base, BASES)
    if full and base != "float":
        raise UserError(f"--method full trains the kernels that --base {base} would freeze: it needs --base float")
    return dataclasses.replace(
        arguments,
        base=base,
        alpha=arguments.alpha or 2.0 * arguments.rank,
        learning_rate=arguments.learning_rate or LEARNING_RATES[arguments.method],
    )


def transform(arguments: Arguments) -> Transform:
    """What turns a classifier's plain parameters into those to train: quantized, with the method, and a free head."""
    method = METHODS[arguments.method](arguments, BASES[arguments.base]())
    return jpeft.chain(method, jpeft.unfreeze(targets="head/.*"))
