"""Fields of a `config.json`: those that a model understands, those that change nothing, and all others, refused."""

from collections.abc import Iterable, Mapping
from typing import Any


Fields = Mapping[str, Any]  # of a config.json

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


def class_of(fields: Fields, default: str) -> str:
    """The class of transformers that the file is of."""
    return (fields.get("architectures") or [default])[0]


def label_names(fields: Fields, num_labels: int | None) -> tuple[int, tuple[str, ...]]:
    """How many labels there are, and their names: those of the file, unless another number is asked for."""
    named = fields.get("id2label") or {}
    names = tuple(str(named[i]) for i in sorted(named, key=int))
    count = num_labels or len(names) or fields.get("num_labels") or 2
    return count, names if len(names) == count else ()


def label_fields(num_labels: int, labels: tuple[str, ...], problem_type: str | None) -> dict[str, Any]:
    """Undo `label_names`. One label is a regression, as it is to transformers."""
    labels = labels or tuple(f"LABEL_{i}" for i in range(num_labels))
    return {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "problem_type": problem_type or ("regression" if num_labels == 1 else None),
    }
