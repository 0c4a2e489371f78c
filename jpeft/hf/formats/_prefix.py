"""Prefixes: keys and values of all layers in one matrix, of layer l the keys at 2 l and the values at 2 l + 1."""

import re
from typing import Any

import numpy as np

from ..._node import whole
from ..._tree import Params, modules
from ...additive._prefix import Prefix, put_prefix
from ._format import Config, Format, Shapes, Tensors, Wide, positive
from ._prompt import ROWS, UNUSED, task


ATTENTION = re.compile(r"(?:.*/)?layers(?:_(\d+))?/(?:self_)?attention")
COUNTS = "num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim"


def shapes(config: Config) -> Shapes:
    return {ROWS: (config["num_virtual_tokens"], 2 * config["num_layers"] * config["token_dim"])}


def put(params: Params, tree: Any, config: Config, tensors: Tensors) -> Params:
    if config["num_transformer_submodules"] > 1:
        raise ValueError("PEFT gives several layers of an encoder-decoder the same prefix, which no node here does")
    length, layers, heads, width = (config[name] for name in COUNTS)
    found = _attentions(params)
    stacked = ATTENTION.fullmatch(found[0])[1] is None
    one = next(x for path, x in tree.leaves.items() if path.startswith(f"{found[0]}/"))
    count = whole(one).shape[0] if stacked else len(found)
    sizes = {_key_width(path, tree) for path in found}
    if count != layers or sizes != {width}:
        raise ValueError(f"it is of {layers} layers with keys of {width} features, the tree of {count} with {sizes}")
    rows = tensors[ROWS].reshape(length, layers, 2, heads, width // heads)
    rows = np.moveaxis(rows, (1, 2), (0, 1))  # (layers, 2, length, heads, width)
    if stacked:
        nodes = {f"{found[0]}/kv": Prefix(keys=rows[:, 0], values=rows[:, 1])}
    else:
        nodes = {f"{path}/kv": Prefix(keys=x[0], values=x[1]) for path, x in zip(found, rows, strict=True)}
    return put_prefix(params, nodes, length)


def _attentions(params: Params) -> list[str]:
    """The paths of self-attention, in the order of the layers."""
    found = [(match, path) for path in modules(params) if (match := ATTENTION.fullmatch(path))]
    if not found or "decoder" in params:
        raise ValueError("it goes to models with one stack of layers, `layers_{i}/attention`")
    return [path for match, path in sorted(found, key=lambda pair: int(pair[0][1] or 0))]


def _key_width(path: str, tree: Any) -> int:
    """How many features the keys of an attention have, of all heads."""
    of = {m.path.removeprefix(f"{path}/"): m for m in tree.today if m.is_weight and m.path.startswith(f"{path}/")}
    if "key/kernel" in of:
        return of["key/kernel"].outputs
    outputs = sum(m.outputs for m in tree.at[f"{path}/qkv/kernel"] if m.index == of["out/kernel"].index)
    return (outputs - of["out/kernel"].inputs) // 2


def take(params: Params, tree: Any, nodes: dict[str, Any]) -> tuple[Tensors, Config]:
    attentions = [f"{path}/kv" for path in _attentions(params)]
    if sorted(path.rpartition("/")[0] for path in nodes) != sorted(attentions):
        raise ValueError("PEFT has one prefix at each layer of a model, and here there are others, or more")
    by_owner = {path.rpartition("/")[0]: node for path, node in nodes.items()}
    own = [by_owner[path] for path in attentions]
    both = [np.stack([np.asarray(node.keys), np.asarray(node.values)], axis=-4) for node in own]
    rows = both[0] if both[0].ndim == 5 else np.stack(both)  # (layers, 2, length, heads, width)
    if len({x.shape for x in both}) > 1:
        raise ValueError("PEFT has prefixes of one length and width for all layers")
    layers, _, length, heads, width = rows.shape
    config = {"num_virtual_tokens": length, "num_layers": layers, "num_attention_heads": heads,
              "token_dim": heads * width, "num_transformer_submodules": 1}  # fmt: skip
    return {ROWS: np.moveaxis(rows, (0, 1), (1, 2)).reshape(length, -1)}, config | task(tree)


def check(config: Config) -> list[str]:
    faults = positive(config, *COUNTS)
    if not faults and config["token_dim"] % config["num_attention_heads"]:
        faults.append("num_attention_heads must divide token_dim")
    return faults


PREFIX = Format(
    peft_type="PREFIX_TUNING",
    nodes=(Prefix,),
    fields={**dict.fromkeys(COUNTS, 0), "num_transformer_submodules": 1},
    unused=UNUSED | {"prefix_projection", "init_weights"},
    check=check,
    wide=Wide(shapes, put, take),
)
