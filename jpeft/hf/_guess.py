"""Which model a tree of parameters is of, where nobody says so: the architecture whose parameters they are."""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn

from .._node import whole
from . import architectures
from ._load import parameter_shapes
from ._names import Architecture, Row


# Models of an architecture differ in their names by head and by kind, never by size, unless kernels are joined.
_SIZES = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
_EXPERTS = {"num_experts_per_tok": 1}
_KINDS = (
    {},
    {"feed_forward_proj": "gated-gelu"},
    _SIZES,
    {**_SIZES, **_EXPERTS, "num_local_experts": 2},
    {**_SIZES, **_EXPERTS, "num_experts": 2, "moe_intermediate_size": 8},
    {"vocab_size": 8, "n_embd": 8, "n_layer": 1, "n_head": 2},
)
_TIED = ({}, {"tie_word_embeddings": False}, {"tie_word_embeddings": True})
_HEADS = (None, "classification", "tokens", "embedding")


def guess(leaves: Mapping[str, Any], named: Callable, names: Iterable[str]) -> Any:
    """`named(architecture, rows)` of the architecture that has just these leaves, and knows most `names` of a file.

    Without an architecture of ours that is so, the paths may be those of transformers' Flax models.

    **Raises** `ValueError` if there is none, or if there are several that name a parameter differently.
    """
    names = [name for name in names if "." in name]
    found: dict[tuple[str, ...], tuple[Any, list[str]]] = {}
    for kind, architecture, model in _candidates(fused=any("qkv/" in path for path in leaves)):
        rows = architecture.rows(model)
        joined = any(row.sizes for row in rows)  # in sizes that its own config tells alone
        tree = None if joined else _named(named, architecture, rows)
        key = tuple(sorted(m.parameter for m in tree.today)) if tree else ()
        if (key and key in found) or ((key or joined) and _is(architecture, model, leaves)):
            found.setdefault(key, (tree, []))[1].append(kind)
    if not found and (tree := _named(named, *_flax(leaves))):
        return tree
    score = {key: _known(tree, names) for key, (tree, _) in found.items()}
    best = [found[key] for key, count in score.items() if count == max(score.values())]
    if len(best) == 1 and best[0][0] is not None:
        return best[0][0]
    if best:
        kinds = "; ".join(", ".join(dict.fromkeys(kinds)) for _, kinds in best)
        raise ValueError(f"These parameters may be of models that name them differently: {kinds}. Pass `model=`.")
    raise ValueError(
        "It is not clear which model these parameters are of, so that the names in a file could be matched with them: "
        f"pass `model=`. There are {', '.join(list(leaves)[:4])}, ..."
    )


def _named(named: Callable, architecture: Architecture, rows: Iterable[Row]) -> Any:
    """The named tree, or `None` if it has leaves without a name."""
    try:
        tree = named(architecture, rows)
    except ValueError:  # kernels that are joined, of other sizes than these
        return None
    return None if tree.nameless else tree


def _known(tree: Any, names: list[str]) -> int:
    if tree is None:
        return 0
    spelling = tree.spelling(names)
    return sum(bool(tree.heads(spelling.ours(name))) for name in names)


def _is(architecture: Architecture, model: nn.Module, leaves: Mapping[str, Any]) -> bool:
    """Whether the leaves are those of such a model: all that it has, and of its head no other. Biases may differ."""
    unnumbered = lambda paths: {re.sub(r"layers(_\d+)?/", "layers/", path) for path in paths}
    own, theirs = unnumbered(parameter_shapes(architecture, model)), unnumbered(leaves)
    head = lambda paths: {path for path in paths if re.fullmatch(architecture.head, path)}
    return head(own) == head(theirs) and all(path.endswith("bias") for path in own - theirs)


def _candidates(*, fused: bool) -> Iterator[tuple[str, Architecture, nn.Module]]:
    options = [{"head": head} if head else {} for head in _HEADS] + [{"fused": True}] * fused
    for kind, architecture in architectures.ARCHITECTURES.items():
        ways = itertools.product(_KINDS, _TIED, options)
        models = (_build(kind, architecture, {**fields, **tied}, own) for fields, tied, own in ways)
        yield from ((kind, architecture, model) for model in dict.fromkeys(models) if model is not None)


def _build(kind: str, architecture: Architecture, fields: Mapping[str, Any], options: dict) -> nn.Module | None:
    try:
        return architecture.build({"model_type": kind, **fields}, **options)
    except (ValueError, TypeError, KeyError):
        return None


def _flax(leaves: Mapping[str, Any]) -> tuple[Architecture, list[Row]]:
    """Paths that are transformers' names with slashes: those of the Flax models that it had.

    Not those of its `Conv1D`, which its Flax models have transposed.
    """
    ends = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
    rows = []
    for path, x in leaves.items():
        *modules, last = path.split("/")
        letters = {2: "oi", 4: "oihw"}.get(len(whole(x).shape)) if last == "kernel" else ""
        if last in ends and modules and letters is not None and not re.fullmatch(r"c_(attn|proj|fc)", modules[-1]):
            rows.append(Row(path, (".".join([*modules, ends[last]]),), letters))
    tables = [row.files[0] for row in rows if row.ours.endswith(("embed_tokens/embedding", "shared/embedding"))]
    tied = {"lm_head.weight": tables[0]} if tables else {}
    none: Any = lambda *_: None
    return Architecture(none, none, none, tied=tied), rows
