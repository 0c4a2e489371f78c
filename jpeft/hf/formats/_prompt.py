"""Prompts: embeddings before those of the tokens. A P-tuning file holds those that its network has made."""

import re
from typing import Any

import numpy as np

from ..._targets import TABLE
from ..._tree import Params
from ...additive._intrinsic import IntrinsicPrompt
from ...additive._prompt import Prompt, put_prompt
from ...additive._ptuning import PTuning
from ._format import Config, Format, Shapes, Tensors, Wide, positive


ROWS = "prompt_embeddings"

# Of the base, which the tree has itself.
FIELDS = {"num_virtual_tokens": 0, "token_dim": 0, "num_transformer_submodules": 1}
UNUSED = frozenset({"num_layers", "num_attention_heads", "prompt_tuning_init", "prompt_tuning_init_text",
                    "tokenizer_name_or_path", "tokenizer_kwargs", "prompt_tuning_init_state_dict_path",
                    "prompt_tuning_init_task", "encoder_reparameterization_type", "encoder_hidden_size",
                    "encoder_num_layers", "encoder_dropout"})  # fmt: skip


def shapes(config: Config) -> Shapes:
    return {ROWS: (config["num_virtual_tokens"] * config["num_transformer_submodules"], config["token_dim"])}


def put(params: Params, tree: Any, config: Config, tensors: Tensors) -> Params:
    # Of an encoder and a decoder both have rows in the file, and PEFT reads those of the encoder alone.
    return placed(params, tree, config, lambda rows: Prompt(rows=rows), tensors[ROWS][: config["num_virtual_tokens"]])


def placed(params: Params, tree: Any, config: Config, new: Any, rows: np.ndarray, **options: Any) -> Params:
    """The tree with a node of these rows at its table of tokens."""
    tables = [m for m in tree.today if m.is_table and re.fullmatch(options.setdefault("targets", TABLE), m.path)]
    width = rows.shape[1]
    if wrong := [f"{m.path} has {m.outputs} features, the prompt {width}" for m in tables if m.outputs != width]:
        raise ValueError("; ".join(wrong))
    how: dict[str, Any] = {"within": "", "key": None, "init": "noise", "length": len(rows)}
    return put_prompt(params, lambda _: new(rows), **how, **options)


def take(params: Params, tree: Any, nodes: dict[str, Any]) -> tuple[Tensors, Config]:
    """Prompts that follow one another are one prompt."""
    in_front(nodes)
    ordered = sorted(nodes.values(), key=lambda node: node.start)
    rows = np.concatenate([np.asarray(node.prompt(None)) for node in ordered])
    return {ROWS: rows}, told(rows, tree)


def in_front(nodes: dict[str, Any]) -> None:
    """**Raises** `ValueError` for prompts that are in the places of a token."""
    if places := {path: node.placeholder for path, node in nodes.items() if node.placeholder is not None}:
        raise ValueError(f"PEFT puts prompts before the text, and these are in the places of a token: {places}")


def alone(nodes: dict[str, Any]) -> Any:
    """The only prompt; **raises** `ValueError` where there are several, and as `in_front` does."""
    in_front(nodes)
    if len(nodes) > 1:
        raise ValueError(f"PEFT has one prompt of this type, and here are {', '.join(nodes)}")
    (node,) = nodes.values()
    return node


def told(rows: np.ndarray, tree: Any) -> Config:
    """What the config says of a prompt."""
    return {"num_virtual_tokens": len(rows), "token_dim": rows.shape[1], "num_transformer_submodules": 1} | task(tree)


def task(tree: Any) -> Config:
    """The type of task, where the tree tells it. An encoder is of none by itself."""
    if any(path.startswith("decoder/") for path in tree.leaves):
        return {"task_type": "SEQ_2_SEQ_LM"}
    return {"task_type": "CAUSAL_LM"} if any(path.startswith("embed/") for path in tree.leaves) else {}


def check(config: Config) -> list[str]:
    return positive(config, "num_virtual_tokens", "token_dim", "num_transformer_submodules")


PROMPT = Format(
    peft_type="PROMPT_TUNING",
    nodes=(Prompt, IntrinsicPrompt),
    fields=FIELDS,
    unused=UNUSED,
    check=check,
    wide=Wide(shapes, put, take),
)
P_TUNING = Format(
    peft_type="P_TUNING", nodes=(PTuning,), fields=FIELDS, unused=UNUSED, check=check, wide=Wide(shapes, put, take)
)
