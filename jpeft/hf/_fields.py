"""Fields of a `config.json`: those that a model understands, those that change nothing, and all others, refused."""

import builtins
import dataclasses
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any


Fields = Mapping[str, Any]  # of a config.json
MOST_LABELS = 2**17

# Of every model: training, generation, and how the file was written. Fields that begin with "_" are the writer's own.
HARMLESS = frozenset(
    """
    architectures model_type transformers_version torch_dtype dtype torchscript use_cache use_return_dict return_dict
    output_attentions output_hidden_states output_past return_dict_in_generate gradient_checkpointing
    chunk_size_feed_forward initializer_range initializer_factor layerdrop tokenizer_class tokenizer_file language
    finetuning_task task_specific_params prefix id2label label2id num_labels problem_type
    pad_token_id bos_token_id eos_token_id sep_token_id cls_token_id mask_token_id unk_token_id
    attn_implementation
    """.split()  # noqa: SIM905
)


def check(
    fields: Fields,
    *,
    known: Iterable[str],
    harmless: Iterable[str] = (),
    only: Mapping[str, Any] = {},
    faults: Iterable[str] = (),
) -> None:
    """Refuse what a model does not understand.

    **Arguments:**

    - `known`: the fields that it reads.
    - `harmless`: fields that change nothing, besides those that never do.
    - `only`: fields that it needs not read, as it supports one value alone.
    - `faults`: what else is not supported.

    **Raises** `ValueError` with every field whose value, or whose meaning, is not supported.
    """
    understood = {*known, *harmless, *HARMLESS, *only}
    refused = [f"{name}={fields[name]!r} (only {value!r})" for name, value in only.items()
               if fields.get(name, value) != value]  # fmt: skip
    refused += [f"{name}={value!r} (not a known field)" for name, value in fields.items()
                if name not in understood and not name.startswith("_")]  # fmt: skip
    refused += faults
    if refused:
        raise ValueError(f"config.json has fields that this model does not support: {'; '.join(refused)}")


def typed(cls: type, given: Fields) -> Any:
    """`cls(**given)`, a dataclass of the fields of a file.

    **Raises** `ValueError` with every field that is of another type, and for numbers that cannot go together.
    """
    hints = typing.get_type_hints(cls)
    wrong = [f"{name}={x!r} (no {hints[name]})" for name, x in given.items() if not _is(x, hints[name])]
    if wrong:
        raise ValueError(f"config.json has fields of other types: {'; '.join(wrong)}")
    try:
        return cls(**given)
    except ArithmeticError as error:
        raise ValueError(f"config.json has sizes that cannot be: {error}") from error


def _is(x: Any, hint: Any) -> bool:
    """Whether a value is of a type; numbers are such that 64 bits hold, and no booleans."""
    of = typing.get_args(hint)
    match typing.get_origin(hint) or hint:
        case types.UnionType | typing.Union:
            return any(_is(x, part) for part in of)
        case typing.Literal:
            return x in of
        case builtins.tuple:
            of = of[:1] * len(x) if isinstance(x, tuple) and of[-1] is ... else of
            return isinstance(x, tuple) and len(x) == len(of) and all(map(_is, x, of))
        case builtins.float:
            return type(x) in (int, float) and abs(x) <= sys.float_info.max
        case builtins.int:
            return type(x) is int and abs(x) < 2**63
        case kind:
            return type(x) is kind or dataclasses.is_dataclass(x)  # None, bool, str; what `Scaling` describes


def class_of(fields: Fields, default: str) -> str:
    """The class of transformers that the file is of."""
    names = fields.get("architectures") or [default]
    if not (isinstance(names, list) and isinstance(names[0], str)):
        raise ValueError(f"config.json has architectures={names!r}: it must be a list of names")
    return names[0]


def label_names(fields: Fields, num_labels: int | None) -> tuple[int, tuple[str, ...]]:
    """How many labels there are, and their names: those of the file, unless another number is asked for."""
    named = fields.get("id2label") or {}
    names = tuple(str(named[i]) for i in sorted(named, key=int))
    count = num_labels or len(names) or fields.get("num_labels") or 2
    if not 0 < count <= MOST_LABELS:
        raise ValueError(f"config.json has num_labels={count!r}: pass `num_labels=`, up to {MOST_LABELS}")
    return count, names if len(names) == count else ()


def label_fields(num_labels: int, labels: tuple[str, ...], problem_type: str | None) -> dict[str, Any]:
    """Undo `label_names`. One label is a regression, as it is to transformers."""
    labels = labels or tuple(f"LABEL_{i}" for i in range(num_labels))
    return {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "problem_type": problem_type or ("regression" if num_labels == 1 else None),
    }
