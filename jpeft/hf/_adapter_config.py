"""`adapter_config.json`: what in it is understood, which modules it names, and how the like is written."""

import collections
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from ._patterns import is_pattern, matches
from .formats._format import Config


# Fields of every type: those that are read elsewhere, and those that tell only where an adapter is from.
COMMON = frozenset({"peft_type", "peft_version", "target_modules", "exclude_modules", "layers_to_transform",
                    "layers_pattern", "modules_to_save", "bias", "fan_in_fan_out", "auto_mapping", "task_type",
                    "base_model_name_or_path", "revision", "inference_mode"})  # fmt: skip

MOST = 4096  # patterns in a config, and names in fields whose names are looked for in every module's

REASONS = {
    "layer_replication": "the adapter is for a model that has some layers of its base several times. Make that model, "
    "and an adapter without the field",
    "use_qalora": "QALoRA is of GPTQ bases in PEFT, which are not read here",
    "alora_invocation_tokens": "activated LoRA acts from a token of the text on, which no node here does",
    "kasa_config": "KaSA changes the base when the adapter is loaded",
    "velora_config": "VeLoRA changes what backward passes keep, which no node here does",
    "arrow_config": "Arrow routes between several adapters",
    "use_bdlora": "its matrices are block-diagonal",
    "monteclora_config": "its factors are random variables",
}


def fill(config: Config, fields: Mapping[str, Any], unused: Iterable[str]) -> tuple[Config, list[str]]:
    """The config with defaults for what it leaves out, and its faults: fields of other types or not understood."""
    faults = []
    for name, x in config.items():
        if name in fields:
            if x is not None and not _of_type(x, fields[name]):
                faults.append(f"{name} = {x!r}: it must be like {fields[name]!r}")
            elif x is not None and name.endswith("dropout") and not 0 <= x < 1:
                faults.append(f"{name} = {x!r}: from 0 to below 1")
        elif name not in COMMON and name not in unused and not (x is False or x in (None, "", "none", [], {})):
            faults.append(f"{name} = {x!r}: {REASONS.get(name, 'this field is not understood')}")
    for name in ("target_modules", "target_parameters", "exclude_modules", "modules_to_save", "layers_pattern"):
        if not _is_names(config.get(name)):
            faults.append(f"{name} = {config[name]!r}: it must be a list of names")
    for name in ("modules_to_save", "layers_pattern"):
        x = config.get(name)
        if (isinstance(x, list) and len(x) > MOST) or (name == "modules_to_save" and isinstance(x, str)):
            faults.append(f"{name}: it must be a list of {MOST} names at most")
    if not isinstance(layers := config.get("layers_to_transform"), list | int | None):
        faults.append(f"layers_to_transform = {layers!r}: it must be a list of numbers")
    given = {name: x for name, x in config.items() if x is not None}
    return dict(fields) | given, faults


def _of_type(x: Any, default: Any) -> bool:
    if isinstance(default, bool) or isinstance(x, bool):
        return type(x) is type(default) or default is None
    if isinstance(default, float):
        return is_number(x)
    if isinstance(default, list) and default:
        return isinstance(x, list) and all(type(entry) is type(default[0]) for entry in x)
    return default is None or isinstance(x, type(default))


def is_number(x: Any) -> bool:
    """Whether it is a number that a float32 holds: JSON has NaN, infinity, and integers of any length, too."""
    return type(x) in (int, float) and abs(x) <= float(np.finfo(np.float32).max)


def _is_names(x: Any) -> bool:
    return x is None or isinstance(x, str) or (isinstance(x, list) and all(isinstance(name, str) for name in x))


def pattern_faults(config: Config, patterns: Mapping[str, str], fields: Mapping[str, Any]) -> list[str]:
    """What is wrong in the fields that give numbers for patterns."""
    faults = []
    if sum(len(config[name]) for name in patterns.values()) > MOST:
        return [f"{', '.join(patterns.values())} have more than {MOST} patterns"]
    for field, name in patterns.items():
        for pattern, x in config[name].items():
            if not _of_type(x, fields[field]):
                faults.append(f"{name}[{pattern!r}] = {x!r}: it must be a number")
            if not is_pattern(pattern):
                faults.append(f"{name}[{pattern!r}]: no regular expression that is matched here, in linear time")
    return faults


def selector(config: Config) -> Callable[[str], bool] | None:
    """Whether `target_modules` names a module, as PEFT reads it; `None` where it does not tell, or by a regular
    expression that is not matched here.
    """
    targets, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    saved = config.get("modules_to_save") or []
    regexes = [x for x in (targets, excluded) if isinstance(x, str)]
    if targets is None or targets == "all-linear" or not all(map(is_pattern, regexes)):
        return None
    layers, stacks = config.get("layers_to_transform"), config.get("layers_pattern") or []
    layers = [layers] if isinstance(layers, int) else layers or []
    stacks = [stacks] if isinstance(stacks, str) else stacks
    is_target, is_excluded = _namer(targets), _namer(excluded)

    def chosen(name: str) -> bool:
        if is_excluded(name) or any(f".{end}." in f".{name}." for end in saved):
            return False
        return is_target(name) and (isinstance(targets, str) or not layers or _layer(name, stacks) in layers)

    return chosen


def _namer(names: str | list[str]) -> Callable[[str], bool]:
    """Whether a module's name matches a regular expression, or ends with one of some names."""
    if isinstance(names, str):
        return functools.partial(matches, names)
    known = set(names)
    ends = lambda module: itertools.accumulate(reversed(module.split(".")), lambda end, part: f"{part}.{end}")
    return lambda module: not known.isdisjoint(ends(module))


def _layer(module: str, stacks: list[str]) -> int | None:
    """The first number in a module's name, or the one after the name of a stack."""
    patterns = [rf"(?:^|.*?\.){re.escape(name)}\.(\d+)\." for name in stacks] or [r".*?\.[^.]*\.(\d+)\."]
    return next((int(match[1]) for p in patterns if (match := re.match(p, module))), None)


def merged(fields: Mapping[str, Config], patterns: Mapping[str, str]) -> tuple[Config, list[str]]:
    """One config of what the modules say, by name: the most common word, and patterns for those who differ.

    And the faults: fields in which modules differ, and for which PEFT has no patterns. `None` agrees with everything.
    """
    config: Config = {}
    faults = []
    for field in {name: None for x in fields.values() for name in x}:
        said = {module: x[field] for module, x in fields.items() if x.get(field) is not None}
        if not said:
            continue
        words = list(said.values())
        common = max(words, key=words.count)
        others = {module: x for module, x in said.items() if x != common}
        config[field] = common
        if others and field in patterns:
            config[patterns[field]] = _as_patterns(others, fields)
        elif others:
            faults.append(f"{field} is {common!r}, but {others}: PEFT has one for all modules")
    return config, faults


def _as_patterns(others: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Any]:
    """Values of some modules by the last part of their names where that tells them from the rest, else by the whole."""
    by_end = collections.defaultdict(list)
    for module in modules:
        by_end[module.rpartition(".")[2]].append(others.get(module))
    return {
        end if x == by_end[end][0] and by_end[end].count(x) == len(by_end[end]) else re.escape(module): x
        for module, x in others.items()
        for end in [module.rpartition(".")[2]]
    }


def shortened(chosen: Iterable[str], known: Iterable[str]) -> list[str]:
    """Names that pick just the chosen of the known modules: their last parts where those do."""
    chosen, found = set(chosen), []
    others = {name.rpartition(".")[2] for name in known if name not in chosen}
    for name in sorted(chosen):
        end = name.rpartition(".")[2]
        found.append(name if end in others else end)
    return sorted(set(found))
