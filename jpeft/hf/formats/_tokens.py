"""Trainable tokens, by themselves and within LoRA. Their tensor is called a delta: it holds the rows themselves."""

import dataclasses

from ...selective._tokens import Tokens
from .._modules import Module
from ._format import Config, Format, Shapes, Tensors


ALONE, WITHIN = "trainable_tokens_delta", "token_adapter.trainable_tokens_delta"


def indices(m: Module, config: Config) -> tuple[int, ...]:
    """Of a table's tokens, by the end of its name; a list without names is of the table of inputs."""
    given = config.get("trainable_token_indices") or config.get("token_indices") or []
    if isinstance(given, dict):
        given = next((ids for name, ids in given.items() if f".{m.name}".endswith(f".{name}")), [])
    return tuple(given)


def shapes(end: str, m: Module, config: Config, tensors: Tensors) -> Shapes:
    return {end: (len(indices(m, config)), m.outputs if m.is_table else m.inputs)}


def read(end: str, m: Module, config: Config, tensors: Tensors) -> list:
    if not m.is_table:
        raise ValueError("its tokens are no rows of a table: trainable tokens of an output head have no node here")
    ids = indices(m, config)
    wrong = [n for n in ids if not 0 <= n < m.inputs]
    if wrong or len(set(ids)) != len(ids):
        raise ValueError(f"its tokens must be different ones of {m.inputs}, not {wrong or list(ids)}")
    return [Tokens(rows=tensors[end], ids=ids)]


def write(end: str, m: Module, nodes: list) -> tuple[Tensors, Config]:
    (node,) = nodes
    if not m.is_table:
        raise ValueError("PEFT has trainable tokens for tables alone")
    return {end: node.rows}, {"ids": list(node.ids)}


def _alone(fields: dict[str, Config]) -> dict[str, Config]:
    return {module: {"token_indices": x["ids"]} for module, x in fields.items()}


def _within(fields: dict[str, Config]) -> dict[str, Config]:
    tokens = {module: x["ids"] for module, x in fields.items()}
    return {module: {"trainable_token_indices": tokens} for module in fields}


def check(config: Config) -> list[str]:
    given = config.get("trainable_token_indices") or config.get("token_indices") or []
    lists = list(given.values()) if isinstance(given, dict) else [given]
    right = all(isinstance(ids, list) and all(type(n) is int for n in ids) for ids in lists)
    return [] if right else [f"the indices of trainable tokens must be integers, not {given!r}"]


def _bound(end: str) -> dict:
    return {
        "shapes": lambda *given: shapes(end, *given),
        "read": lambda *given: read(end, *given),
        "write": lambda *given: write(end, *given),
        "ends": (end,),
    }


TOKENS = Format(
    peft_type="TRAINABLE_TOKENS",
    nodes=(Tokens,),
    fields={"token_indices": []},
    unused=frozenset({"init_weights", "ensure_weight_tying"}),
    check=check,
    settle=_alone,
    **_bound(ALONE),
)
TOKENS_WITHIN = dataclasses.replace(TOKENS, peft_type="LORA", settle=_within, fields={}, **_bound(WITHIN))
