"""The table of methods: a row here, and every law holds for the method or is excepted with its reason."""

import math

import jpeft
from jpeft.testing import LAYERS, Method


STARTS_ELSEWHERE = "the model runs on more positions, and attends to the prompt from the first step on"
ROUNDED = "rounded kernels do not train: it refuses them"
AFFINE = {"unboxes": "it stands beside the kernel, which is unboxed as it is"}
NO_WEIGHTS = dict.fromkeys(("merges", "unboxes"), "it acts on activations, and is no function of the weights")


def _kernels(sites):
    """The `(stack, in, out)` of every kernel that is no output head."""
    for site in sites.values():
        if site.path.endswith("kernel") and not site.path.startswith("lm_head"):
            size = lambda letter, s=site: math.prod(n for n, c in zip(s.shape, s.axes, strict=True) if c == letter)
            yield size("s"), size("i"), size("o")


def _low_rank(rank):
    return lambda params, sites: sum(s * rank * (i + o) for s, i, o in _kernels(sites))


def _dora(rank):
    return lambda params, sites: sum(s * (rank * (i + o) + o) for s, i, o in _kernels(sites))


def _adalora(rank):
    return lambda params, sites: sum(s * rank * (i + 1 + o) for s, i, o in _kernels(sites))


def _vera(rank):
    return lambda params, sites: sum(s * (rank + o) for s, i, o in _kernels(sites))


def _loha(rank):
    return lambda params, sites: sum(s * 2 * rank * (i + o) for s, i, o in _kernels(sites))


def _lokr(rank):
    """W1 is an array, and so is W2 where its larger side is twice the rank at most."""
    first = {8: 2, 16: 4, 32: 4}
    second = lambda i, o: rank * (i + o) if max(i, o) > 2 * rank else i * o
    return lambda params, sites: sum(
        s * (first[i] * first[o] + second(i // first[i], o // first[o])) for s, i, o in _kernels(sites)
    )


def _lokr_both(factor):
    """Both matrices are two factors of rank one."""
    return lambda params, sites: sum(s * (2 * factor + (i + o) // factor) for s, i, o in _kernels(sites))


def _inputs(count):
    return lambda params, sites: sum(s * count(i) for s, i, o in _kernels(sites))


def _sizes(*endings):
    return lambda params, sites: sum(math.prod(s.shape) for n, s in sites.items() if n.endswith(endings))


def _but_head(params, sites):
    """Every entry of every parameter but the output head's."""
    return sum(math.prod(s.shape) for n, s in sites.items() if not n.startswith("lm_head"))


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
        "dora",
        lambda p, s, key: jpeft.dora(p, rank=3, alpha=6, sites=s, key=key),
        _dora(3),
        exceptions={"trains": "its norms are constants to gradients, which so are no slopes"},
    ),
    Method("pissa", lambda p, s, key: jpeft.pissa(p, rank=3, alpha=6, sites=s, key=key), _low_rank(3)),
    Method("olora", lambda p, s, key: jpeft.olora(p, rank=3, sites=s, key=key), _low_rank(3)),
    Method("adalora", lambda p, s, key: jpeft.adalora(p, rank=3, alpha=60, sites=s, key=key), _adalora(3)),
    Method(
        "vera",
        lambda p, s, key: jpeft.vera(p, rank=5, sites=s, key=key),
        _vera(5),
        exceptions={"unboxes": "what all kernels share is in the tree, and not in the one parameter that is unboxed"},
    ),
    Method("hira", lambda p, s, key: jpeft.hira(p, rank=3, sites=s, key=key), _low_rank(3)),
    Method("loha", lambda p, s, key: jpeft.loha(p, rank=3, alpha=6, sites=s, key=key), _loha(3)),
    Method("lokr", lambda p, s, key: jpeft.lokr(p, rank=3, alpha=6, sites=s, key=key), _lokr(3)),
    Method(
        "lokr_both",
        lambda p, s, key: jpeft.lokr(
            p, rank=1, decompose_both=True, decompose_factor=4, init="lycoris", sites=s, key=key
        ),
        _lokr_both(4),
    ),
    Method("oft", lambda p, s, key: jpeft.oft(p, block=8, sites=s, key=key), _inputs(lambda i: i // 8 * 28)),
    Method(
        "oft_exact",
        lambda p, s, key: jpeft.oft(p, block=4, share=True, cayley="exact", sites=s, key=key),
        _inputs(lambda i: 6),
    ),
    Method(
        "boft",
        lambda p, s, key: jpeft.boft(p, block=4, factors=3, sites=s, key=key),
        lambda params, sites: sum(s * (3 * i * 4 + o) for s, i, o in _kernels(sites)),
    ),
    Method("hra", lambda p, s, key: jpeft.hra(p, rank=4, sites=s, key=key), _inputs(lambda i: 4 * i)),
    Method(
        "hra_orthogonal",
        lambda p, s, key: jpeft.hra(p, rank=3, orthogonal=True, sites=s, key=key),
        _inputs(lambda i: 3 * i),
        exceptions={"identity": "orthogonal reflections are never the identity"},
    ),
    Method(
        "miss",
        lambda p, s, key: jpeft.miss(p, rank=5, sites=s, key=key),
        lambda params, sites: sum(s * 5 * o for s, i, o in _kernels(sites)),
    ),
    Method("miss_mini", lambda p, s, key: jpeft.miss(p, rank=4, width=2, sites=s, key=key), _inputs(lambda i: 8)),
    Method("delta", lambda p, s, key: jpeft.delta(p, sites=s, key=key), _but_head),
    Method(
        "tokens",
        lambda p, s, key: jpeft.tokens(p, ids=range(0, 32, 2), sites=s, key=key),
        lambda params, sites: 16 * 16,
    ),
    Method(
        "ia3",
        lambda p, s, key: jpeft.ia3(p, sites=s, key=key),
        lambda params, sites: LAYERS * (8 + 8 + 32),
        exceptions=AFFINE,
    ),
    Method(
        "ia3_encoder",
        lambda p, s, key: jpeft.ia3(p, sites=s, key=key),
        lambda params, sites: LAYERS * (16 + 16 + 32),
        model="encoder",
        exceptions=AFFINE,
    ),
    Method(
        "beft",
        lambda p, s, key: jpeft.beft(p, scale=2.0, sites=s, key=key),
        lambda params, sites: LAYERS * 16,
        model="encoder",
        exceptions=AFFINE,
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
        "prefix",
        lambda p, s, key: jpeft.prefix(p, length=3, sites=s, key=key),
        lambda params, sites: LAYERS * 2 * 3 * 8,
        exceptions=NO_WEIGHTS | {"identity": STARTS_ELSEWHERE},
    ),
    Method(
        "prefix_encoder",
        lambda p, s, key: jpeft.prefix(p, length=3, init="zeros", sites=s, key=key),
        lambda params, sites: LAYERS * 2 * 3 * 16,
        model="encoder",
        exceptions=NO_WEIGHTS | {"identity": STARTS_ELSEWHERE},
    ),
    Method(
        "ptuning_mlp",
        lambda p, s, key: jpeft.ptuning(p, length=4, width=5, key=key),
        lambda params, sites: 4 * 16 + 16 * 5 + 5 + 5 * 5 + 5 + 5 * 16 + 16,
        exceptions=NO_WEIGHTS | {"identity": STARTS_ELSEWHERE},
    ),
    Method(
        "ptuning_lstm",
        lambda p, s, key: jpeft.ptuning(p, length=4, width=5, encoder="lstm", layers=1, key=key),
        lambda params, sites: 4 * 16 + 2 * (16 + 5 + 1) * 4 * 5 + 10 * 10 + 10 + 10 * 16 + 16,
        exceptions=NO_WEIGHTS | {"identity": STARTS_ELSEWHERE},
    ),
    Method(
        "mpt",
        lambda p, s, key: jpeft.mpt(p, length=4, rank=2, key=key),
        lambda params, sites: 4 * 16 + 2 * (4 + 16),
        exceptions=NO_WEIGHTS | {"identity": STARTS_ELSEWHERE},
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
