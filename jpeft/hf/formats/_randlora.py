"""RandLoRA. Its random arrays must be in the file, as VeRA's: once for all, and again at every module.

PEFT lists B's columns term by term and A's rows rank by rank, and multiplies the two: of one B each number of terms
makes another array of ours.
"""

import collections
import functools

import numpy as np

from ...reparam._randlora import RandLoRA
from .._modules import Module
from ._format import Config, Format, Shapes, Shared, Tensors, linear, plain, positive, projected


INNER, OUTER = "randlora_lambda", "randlora_gamma"


def _terms(size: int, config: Config) -> int:
    return -(-size // config["r"])


def shapes(m: Module, config: Config, tensors: Tensors) -> Shapes:
    least = min(m.inputs, m.outputs)
    terms = _terms(least, config)
    return {INNER: (config["r"], terms), OUTER: (terms, least)}


def read(m: Module, config: Config, tensors: Tensors) -> list:
    trained = {"inner": tensors[INNER].T, "outer": tensors[OUTER], "dropout": config["randlora_dropout"]}
    sizes = {"features_in": m.inputs, "features_out": m.outputs}
    return [RandLoRA(narrow=None, wide=None, **trained, **sizes, scale=config["randlora_alpha"] / config["r"])]


def write(m: Module, nodes: list) -> tuple[Tensors, Config]:
    (node,) = nodes
    linear(m, "RandLoRA", conv1d=True)
    r = node.inner.shape[-1]
    fields = {"r": r, "randlora_alpha": plain(node.scale * r), "randlora_dropout": node.dropout}
    return {INNER: node.inner.T, OUTER: node.outer}, fields | {"save_projection": True}


def by_term(x: np.ndarray, terms: int) -> np.ndarray:
    """PEFT's B `(wide, terms, rank)` as `(terms, wide, rank)`, for kernels of so many terms. Others stay."""
    used, others = x[:, :terms], x[:, terms:]
    used = used.reshape(len(x), x.shape[2], terms).transpose(2, 0, 1)
    return np.concatenate([used, others.swapaxes(0, 1)])


def by_rank(x: np.ndarray, terms: int) -> np.ndarray:
    """Undo `by_term`."""
    used, others = x[:terms], x[terms:]
    used = used.transpose(1, 2, 0).reshape(x.shape[1], terms, x.shape[2])
    return np.concatenate([used, others.swapaxes(0, 1)], axis=1)


def shared(config: Config, modules: list[Module]) -> list[Shared]:
    least, most = sorted((max(m.inputs for m in modules), max(m.outputs for m in modules)))
    a, b = (config["r"], 1, least), (most, _terms(least, config), config["r"])
    groups = collections.defaultdict(list)
    for m in modules:
        groups[_terms(min(m.inputs, m.outputs), config)].append(m)
    return [
        Shared("randlora_A", "narrow", modules, a, lambda x: x[:, 0], lambda x: x[:, None], repeated=True),
        *(
            Shared("randlora_B", "wide", group, b, functools.partial(by_term, terms=terms),
                   functools.partial(by_rank, terms=terms), repeated=True)
            for terms, group in groups.items()
        ),
    ]  # fmt: skip


RANDLORA = Format(
    peft_type="RANDLORA",
    nodes=(RandLoRA,),
    bias="randlora_only",
    shapes=shapes,
    read=read,
    write=write,
    ends=(INNER, OUTER),
    fields={"r": 32, "randlora_alpha": 640.0, "randlora_dropout": 0.0, "save_projection": True},
    unused=frozenset({"projection_prng_key", "sparse", "very_sparse", "init_weights"}),
    shared=shared,
    check=lambda config: positive(config, "r") + projected(config),
)
