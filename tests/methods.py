"""The table of methods: a row here, and every law holds for the method or is excepted with its reason."""

import math

import jpeft
from jpeft.testing import LAYERS, Method


STARTS_ELSEWHERE = "the model runs on more positions, and attends to the prompt from the first step on"
ROUNDED = "rounded kernels do not train: it refuses them"
NO_WEIGHTS = dict.fromkeys(("merges", "unboxes"), "it acts on activations, and is no function of the weights")


def _kernels(sites):
    """The `(stack, in, out)` of every kernel that is no output head."""
    for site in sites.values():
        if site.path.endswith("kernel") and not site.path.startswith("lm_head"):
            size = lambda letter, s=site: math.prod(n for n, c in zip(s.shape, s.axes, strict=True) if c == letter)
            yield size("s"), size("i"), size("o")


def _low_rank(rank):
    return lambda params, sites: sum(s * rank * (i + o) for s, i, o in _kernels(sites))


def _sizes(*endings):
    return lambda params, sites: sum(math.prod(s.shape) for n, s in sites.items() if n.endswith(endings))


def _in_layers(share):
    in_layers = lambda sites: sum(math.prod(s.shape) for n, s in sites.items() if n.startswith("layers"))
    return lambda params, sites: round(share * in_layers(sites))


def _bottleneck(width, modules):
    return lambda params, sites: LAYERS * sum(width * (i + o) + width + o for i, o in modules)


METHODS = [
    Method("lora", lambda p, s, key: jpeft.lora(p, rank=3, alpha=6, sites=s, key=key), _low_rank(3)),
    Method(
        "rslora",
        lambda p, s, key: jpeft.lora(p, rank=4, alpha=4, rslora=True, init="gaussian", sites=s, key=key),
        _low_rank(4),
    ),
    Method(
        "bitfit",
        lambda p, s, key: jpeft.bitfit(p),
        _sizes("/bias"),
        model="encoder",
    ),
    Method("norms", lambda p, s, key: jpeft.norms(p), _sizes("/scale", "norm/bias"), model="encoder"),
    Method(
        "unfreeze",
        lambda p, s, key: jpeft.unfreeze(p, targets=[".*embedding", "lm_head/kernel"]),
        _sizes("embedding", "lm_head/kernel"),
    ),
    Method(
        "last_layers",
        lambda p, s, key: jpeft.last_layers(p, k=1),
        _in_layers(1 / LAYERS),
        exceptions={
            "unboxes": "a lifted transform slices all arrays alike, and refuses a parameter that is held in two parts",
            "scans": "of a stacked parameter some rows train; unrolled layers train or do not as a whole",
            "int8": ROUNDED,
            "nf4": ROUNDED,
        },
    ),
    Method(
        "houlsby",
        lambda p, s, key: jpeft.bottleneck(p, width=3, sites=s, key=key),
        _bottleneck(3, [(16, 16), (16, 16)]),
        exceptions=NO_WEIGHTS,
    ),
    Method(
        "pfeiffer",
        lambda p, s, key: jpeft.bottleneck(p, width=3, placement="pfeiffer", init="houlsby", sites=s, key=key),
        _bottleneck(3, [(16, 16)]),
        exceptions=NO_WEIGHTS | {"identity": "its start, a normal of deviation 0.001, is near the identity"},
    ),
    Method(
        "parallel",
        lambda p, s, key: jpeft.bottleneck(p, width=3, placement="parallel", sites=s, key=key),
        _bottleneck(3, [(16, 16)]),
        exceptions=NO_WEIGHTS,
    ),
    Method(
        "prompt",
        lambda p, s, key: jpeft.prompt(p, length=4, key=key),
        lambda params, sites: 4 * 16,
        exceptions=NO_WEIGHTS | {"identity": STARTS_ELSEWHERE},
    ),
    Method(
        "prompt_encoder",
        lambda p, s, key: jpeft.prompt(p, length=4, init="noise", key=key),
        lambda params, sites: 4 * 16,
        model="encoder",
        exceptions=NO_WEIGHTS | {"identity": STARTS_ELSEWHERE},
    ),
]
