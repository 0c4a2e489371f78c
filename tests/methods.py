"""The table of methods: a row here, and every law holds for the method or is excepted with its reason."""

import math
from itertools import pairwise

import jax
import jax.numpy as jnp

import jpeft
from jpeft.testing import LAYERS, Method, shaken, subject


STARTS_ELSEWHERE = "the model runs on more positions, and attends to the prompt from the first step on"
ROUNDED = "rounded kernels do not train: it refuses them"
NOT_IN_ONE = "what all kernels share is in the tree, and not in the one parameter that is unboxed"
AFFINE = {"unboxes": "it stands beside the kernel, which is unboxed as it is"}
MASKED = {"trains": "a mask is a step, and its gradient that of a line: no slope of the loss"}
ROWS = {
    "unboxes": "a lifted transform slices all arrays alike, and refuses a parameter that is held in two parts",
    "scans": "of a stacked parameter some rows train; unrolled layers train or do not as a whole",
}
REFT = {"identity": "its matrices start at random, as the authors have it"}
SIDE_BY_SIDE = {
    "scans": "its arrays have an axis of adapters behind that of the layers, and its gates have none",
    "unboxes": "a lifted transform would slice the gates, too, and refuses",
    "saves": "which adapters act is a call's to say, and is not saved",
}
NO_WEIGHTS = dict.fromkeys(("merges", "unboxes"), "it acts on activations, and is no function of the weights")
SIDE_NETWORK = {
    "identity": "what goes into the head is the side network's",
    "scans": "its side network is one node, of which the law does not know that it is stacked",
}


def _targeted(sites):
    """Every kernel that is no output head."""
    return [site for site in sites.values() if site.path.endswith("kernel") and not site.path.startswith("lm_head")]


def _kernels(sites):
    """Their `(stack, in, out)`."""
    for site in _targeted(sites):
        size = lambda letter, s=site: math.prod(n for n, c in zip(s.shape, s.axes, strict=True) if c == letter)
        yield size("s"), size("i"), size("o")


def _of_kernels(params, sites):
    """Every entry of every kernel but the output head's."""
    return sum(s * i * o for s, i, o in _kernels(sites))


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


def _matrices(sites):
    """How many parameters there are but the output head's, those of every layer counted."""
    counted = lambda name: LAYERS if name.startswith("layers/") else 1
    return sum(counted(name) for name in sites if not name.startswith("lm_head"))


def _in_layers(share):
    in_layers = lambda sites: sum(math.prod(s.shape) for n, s in sites.items() if n.startswith("layers"))
    return lambda params, sites: round(share * in_layers(sites))


def _decoder(*sizes):
    """Random layers of these sizes."""
    normal = lambda n, shape: jax.random.normal(jax.random.key(n), shape)
    return tuple((normal(n, pair) / pair[0] ** 0.5, normal(n, pair[1:])) for n, pair in enumerate(pairwise(sizes)))


def _bottleneck(width, modules):
    return lambda params, sites: LAYERS * sum(width * (i + o) + width + o for i, o in modules)


def _adapters(params, sites, key):
    """Two bottlenecks that have trained, each in a tree of its own."""
    trees = [jpeft.bottleneck(params, width=3, sites=sites, key=k) for k in jax.random.split(key)]
    parts = [(jpeft.partition(tree), jax.random.fold_in(key, n)) for n, tree in enumerate(trees)]
    return [jpeft.combine(shaken(trainable, k, 0.3), frozen) for (trainable, frozen), k in parts]


def _stack(make):
    """Two adapters side by side, and a choice: a half of one, and twice the other."""

    def both(params, sites, key):
        trees = [make(params, sites, k) for k in jax.random.split(key)]
        return jpeft.activate(jpeft.stack(trees), jpeft.Average(0, 1, weights=[0.5, 2.0]))

    return both


def _unipelt(values):
    """LoRA at queries and values, an adapter, and four gates, of each layer."""
    return LAYERS * (2 * (16 + 16) + 2 * (16 + values) + 2 * 4 * 16 + 4 + 16 + 4 * (16 + 1))


READER = 16 * 8 + 8  # what a side network of half the width reads the model through


def _inputs_of(sites):
    """Sums over random rows for every kernel, as `capture_inputs` has them."""
    found = {}
    for site, (stack, size, _) in zip(_targeted(sites), _kernels(sites), strict=True):
        x = jax.random.normal(jax.random.key(len(found)), (*[stack] * site.axes.count("s"), 20, size))
        sums = {"count": jnp.full(x.shape[:-2], 20.0), "total": jnp.sum(x, -2), "energy": jnp.sum(x**2, (-1, -2))}
        found[site.path] = jpeft.Inputs(**sums, product=x.mT @ x, axes=site.axes)
    return found


def _gradients_of(sites):
    """Random gradients of every kernel."""
    return {x.path: jax.random.normal(jax.random.key(n), x.shape) for n, x in enumerate(_targeted(sites))}


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
    Method("eva", lambda p, s, key: jpeft.eva(p, inputs=_inputs_of(s), rank=3, rho=1, alpha=6), _low_rank(3)),
    Method("corda", lambda p, s, key: jpeft.corda(p, inputs=_inputs_of(s), rank=3, alpha=6), _low_rank(3)),
    Method(
        "lora_ga",
        lambda p, s, key: jpeft.lora_ga(p, gradients=_gradients_of(s), rank=3, alpha=6, sites=s),
        _low_rank(3),
    ),
    Method(
        "loftq",
        lambda p, s, key: jpeft.quantize_with_adapter(p, quantize=jpeft.int4(group=8), rank=3, steps=2, sites=s),
        _low_rank(3),
        exceptions={
            "identity": "its base is rounded, and the term is near to what is lost",
            "strips": "it takes a float base away, and leaves codes",
            "saves": "its codes are none that the base by itself has: it is restored onto its own",
            "int8": "it quantizes kernels itself",
            "nf4": "it quantizes kernels itself",
        },
    ),
    Method("adalora", lambda p, s, key: jpeft.adalora(p, rank=3, alpha=60, sites=s, key=key), _adalora(3)),
    Method(
        "vera",
        lambda p, s, key: jpeft.vera(p, rank=5, sites=s, key=key),
        _vera(5),
        exceptions={"unboxes": NOT_IN_ONE},
    ),
    Method(
        "lora_fa",
        lambda p, s, key: jpeft.lora(p, rank=3, alpha=6, freeze_a=True, sites=s, key=key),
        lambda params, sites: sum(s * 3 * o for s, i, o in _kernels(sites)),
    ),
    Method(
        "moslora",
        lambda p, s, key: jpeft.moslora(p, rank=3, alpha=6, sites=s, key=key),
        lambda params, sites: sum(s * 3 * (i + 3 + o) for s, i, o in _kernels(sites)),
    ),
    Method(
        "lora_xs",
        lambda p, s, key: jpeft.lora_xs(p, rank=5, sites=s, key=key),
        lambda params, sites: sum(s * 5 * 5 for s, i, o in _kernels(sites)),
    ),
    Method(
        "tinylora",
        lambda p, s, key: jpeft.tinylora(p, length=6, sites=s, key=key),
        lambda params, sites: sum(s * 6 for s, i, o in _kernels(sites)),
    ),
    Method(
        "tinylora_shared",
        lambda p, s, key: jpeft.tinylora(p, length=6, group={".*attention/.*": "one", ".*": "two"}, sites=s, key=key),
        lambda params, sites: 2 * 6,
        exceptions={"unboxes": NOT_IN_ONE},
    ),
    Method(
        "vblora",
        lambda p, s, key: jpeft.vblora(p, rank=2, vectors=6, length=4, sites=s, key=key),
        lambda params, sites: 6 * 4 + sum(s * 2 * 6 * (i + o) // 4 for s, i, o in _kernels(sites)),
        exceptions={
            "identity": "its start, a product of two factors of about 0.01, is near the identity",
            "unboxes": NOT_IN_ONE,
        },
    ),
    Method(
        "delora",
        lambda p, s, key: jpeft.delora(p, rank=3, bound=2.0, sites=s, key=key),
        lambda params, sites: sum(s * (3 * (i + o) + 1) for s, i, o in _kernels(sites)),
    ),
    Method("gralora", lambda p, s, key: jpeft.gralora(p, rank=4, alpha=8, sites=s, key=key), _low_rank(4)),
    Method(
        "gralora_hybrid",
        lambda p, s, key: jpeft.gralora(p, rank=4, blocks=4, hybrid=2, sites=s, key=key),
        _low_rank(4 + 2),
    ),
    Method(
        "randlora",
        lambda p, s, key: jpeft.randlora(p, rank=3, alpha=6, sites=s, key=key),
        lambda params, sites: sum(s * -(-min(i, o) // 3) * (3 + min(i, o)) for s, i, o in _kernels(sites)),
        exceptions={"unboxes": NOT_IN_ONE},
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
    Method("krona", lambda p, s, key: jpeft.krona(p, scale=2.0, sites=s, key=key), _lokr(16)),
    Method(
        "krona_residual",
        lambda p, s, key: jpeft.krona(
            p, decompose_factor=2, residual=True, targets=".*/(query|out)/kernel", sites=s, key=key
        ),
        lambda params, sites: LAYERS * 2 * (2 * 2 + 8 * 8 + 1),
    ),
    Method(
        "krona_parallel",
        lambda p, s, key: jpeft.krona(p, residual=True, placement="parallel", sites=s, key=key),
        lambda params, sites: LAYERS * (4 * 4 + 4 * 4 + 1),
        exceptions=NO_WEIGHTS,
    ),
    Method(
        "said",
        lambda p, s, key: jpeft.said(p, dimension=80, sites=s, key=key),
        lambda params, sites: 80,
        exceptions={"unboxes": NOT_IN_ONE},
    ),
    Method(
        "did_dense",
        lambda p, s, key: jpeft.said(p, dimension=60, structure_aware=False, projection="dense", sites=s, key=key),
        lambda params, sites: 60,
        exceptions={"unboxes": NOT_IN_ONE},
    ),
    Method(
        "fourierft",
        lambda p, s, key: jpeft.fourierft(p, frequencies=20, scale=50.0, sites=s, key=key),
        lambda params, sites: sum(s * 20 for s, i, o in _kernels(sites)),
        exceptions={"unboxes": NOT_IN_ONE, "identity": "its frequencies start at random"},
    ),
    Method(
        "fourierft_zeros",
        lambda p, s, key: jpeft.fourierft(p, frequencies=30, scale=50.0, init="zeros", sites=s, key=key),
        lambda params, sites: sum(s * 30 for s, i, o in _kernels(sites)),
        exceptions={"unboxes": NOT_IN_ONE},
    ),
    Method(
        "c3a",
        lambda p, s, key: jpeft.c3a(p, sites=s, key=key),
        lambda params, sites: sum(s * i * o // math.gcd(i, o) for s, i, o in _kernels(sites)),
        exceptions={"identity": "its convolutions start at random"},
    ),
    Method(
        "c3a_zeros",
        lambda p, s, key: jpeft.c3a(p, block=4, init="zeros", sites=s, key=key),
        lambda params, sites: sum(s * i * o // 4 for s, i, o in _kernels(sites)),
    ),
    Method(
        "qalora",
        lambda p, s, key: jpeft.qalora(p, rank=3, alpha=6, group=8, sites=s, key=key),
        lambda params, sites: sum(s * 3 * (i // 8 + o) for s, i, o in _kernels(sites)),
    ),
    *(
        Method(
            f"road_{variant}",
            lambda p, s, key, v=variant: jpeft.road(p, targets=".*/(value|out)", variant=v, group=8, sites=s, key=key),
            lambda params, sites, v=variant: LAYERS * v * (8 + 16),
            exceptions=AFFINE,
        )
        for variant in (1, 2, 4)
    ),
    Method(
        "road_encoder",
        lambda p, s, key: jpeft.road(p, targets=".*/(query|up)", group={".*query": 4, ".*": 32}, sites=s, key=key),
        lambda params, sites: LAYERS * (16 + 32),
        model="encoder",
        exceptions=AFFINE,
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
    Method(
        "diff_pruning",
        lambda p, s, key: jpeft.diff_pruning(p, start=0.5, sites=s, key=key),
        lambda params, sites: 2 * _but_head(params, sites) + _matrices(sites),
    ),
    Method(
        "diff_pruning_entries",
        lambda p, s, key: jpeft.diff_pruning(p, start=0.5, structured=False, bounds=(-1.0, 2.0), sites=s, key=key),
        lambda params, sites: 2 * _but_head(params, sites),
    ),
    Method("delta", lambda p, s, key: jpeft.delta(p, sites=s, key=key), _but_head),
    Method(
        "sparse",
        lambda p, s, key: jpeft.sparse(p, mask=jpeft.random_mask(p, density=0.25, scope="each", sites=s), sites=s),
        lambda params, sites: _but_head(params, sites) // 4,
    ),
    Method("shira", lambda p, s, key: jpeft.shira(p, rank=2, sites=s, key=key), _low_rank(2)),
    Method(
        "spiel",
        lambda p, s, key: jpeft.spiel(p, density=0.2, sites=s, key=key),
        lambda params, sites: sum(s * round(0.2 * i * o) for s, i, o in _kernels(sites)),
    ),
    Method(
        "piggyback",
        lambda p, s, key: jpeft.piggyback(p, sites=s, key=key),
        _of_kernels,
        exceptions=MASKED,
    ),
    Method(
        "piggyback_ternary",
        lambda p, s, key: jpeft.piggyback(p, negative=0.0, sites=s, key=key),
        _of_kernels,
        exceptions=MASKED,
    ),
    Method(
        "far",
        lambda p, s, key: jpeft.far(p, primed=shaken(jpeft.merge(p), key), retention=0.25, sites=s),
        lambda params, sites: LAYERS * ((16 + 1) * 8 + (32 + 1) * 4),
        model="encoder",
        exceptions={"identity": "it starts from where the priming has left it"},
    ),
    Method(
        "far_rewound",
        lambda p, s, key: jpeft.far(p, primed=shaken(jpeft.merge(p), key), retention=0.5, rewind=True, sites=s),
        lambda params, sites: LAYERS * (2 * 16 * 16 + 32 * 8),
    ),
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
    Method(
        "bitfit_created",
        lambda p, s, key: jpeft.bitfit(p, create=True, sites=s),
        lambda params, sites: sum(s * o for s, i, o in _kernels(sites)),
        exceptions=AFFINE | {"merges": "the model has no biases that they could become"},
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
        exceptions=ROWS | {"int8": ROUNDED, "nf4": ROUNDED},
    ),
    Method(
        "unfreeze_layers",
        lambda p, s, key: jpeft.unfreeze(p, targets=jpeft.patterns.NORM, layers=[0]),
        lambda params, sites: 2 * 16,
        exceptions=ROWS,
    ),
    Method(
        "blocks",
        lambda p, s, key: jpeft.blocks(p, layers=[1]),
        _in_layers(1 / LAYERS),
        exceptions={
            "unboxes": "what trains of a stack is in the tree, and not in the one parameter that is unboxed",
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
        "double_norm",
        lambda p, s, key: jpeft.bottleneck(p, width=3, placement="double_norm", sites=s, key=key),
        _bottleneck(3, [(16, 16)]),
        model="encoder",
        exceptions=NO_WEIGHTS,
    ),
    Method(
        "parallel_learned",
        lambda p, s, key: jpeft.bottleneck(p, reduction=4, placement="parallel", scale="learned", sites=s, key=key),
        lambda params, sites: _bottleneck(4, [(16, 16)])(params, sites) + LAYERS,
        exceptions=NO_WEIGHTS,
    ),
    Method(
        "adapter_plus",
        lambda p, s, key: jpeft.bottleneck(
            p, width=3, placement="block", scale="channel", stochastic_depth=0.1, init="adapter_plus", sites=s, key=key
        ),
        lambda params, sites: _bottleneck(3, [(16, 16)])(params, sites) + LAYERS * 16,
        exceptions=NO_WEIGHTS | {"identity": "its start, a normal of deviation 0.01, is near the identity"},
    ),
    Method(
        "sparse_adapter",
        lambda p, s, key: jpeft.sparse_adapter(jpeft.bottleneck(p, width=4, init="bert", sites=s, key=key))[0],
        _bottleneck(4, [(16, 16), (16, 16)]),
        exceptions=NO_WEIGHTS | {"identity": "what starts at zero has no scores"},
    ),
    Method(
        "invertible",
        lambda p, s, key: jpeft.invertible(p, key=key),
        lambda params, sites: 2 * (2 * 8 * 4 + 4 + 8),
        exceptions=NO_WEIGHTS,
    ),
    Method(
        "invertible_encoder",
        lambda p, s, key: jpeft.invertible(p, inverse=None, key=key),
        lambda params, sites: 2 * (2 * 8 * 4 + 4 + 8),
        model="encoder",
        exceptions=NO_WEIGHTS,
    ),
    *(
        Method(
            name,
            lambda p, s, key, o=options: jpeft.compacter(p, terms=2, reduction=4, sites=s, key=key, **o),
            lambda params, sites, count=count: count,
            exceptions=NO_WEIGHTS | {"identity": "its start, a product of small random factors, is near the identity"},
        )
        for name, options, count in (
            ("compacter", {"placement": "compacter"}, 2**3 + LAYERS * 2 * (2 * (16 + 4) + 4 + 16)),
            ("compacter_plus", {"placement": "compacter++", "rank": 2}, 2**3 + LAYERS * (2 * 2 * (16 + 4) + 4 + 16)),
            ("phm", {"rank": None, "rule": "own"}, LAYERS * 2 * (2**3 + 2 * 16 * 4 // 2 + 4 + 16)),
        )
    ),
    Method(
        "adamix",
        lambda p, s, key: jpeft.adamix(p, experts=3, width=4, sites=s, key=key),
        lambda params, sites: LAYERS * (3 * (16 + 1) * 4 + (4 + 1) * 16),
        exceptions=NO_WEIGHTS,
    ),
    Method(
        "adamix_lora",
        lambda p, s, key: jpeft.adamix_lora(p, experts=4, rank=3, alpha=6, sites=s, key=key),
        lambda params, sites: sum(s * 3 * (4 * i + o) for s, i, o in _kernels(sites)),
    ),
    Method(
        "moe_lora",
        lambda p, s, key: jpeft.moe_lora(p, rank=2, experts=3, alpha=4, sites=s, key=key),
        lambda params, sites: sum(n * 3 * (i + 2 * (i + o)) for n, i, o in _kernels(sites)),
        exceptions=NO_WEIGHTS,
    ),
    Method(
        "moe_lora_top",
        lambda p, s, key: jpeft.moe_lora(p, rank=2, experts=4, top=2, sites=s, key=key),
        lambda params, sites: sum(n * 4 * (i + 2 * (i + o)) for n, i, o in _kernels(sites)),
        model="encoder",
        exceptions=NO_WEIGHTS,
    ),
    Method(
        "poly",
        lambda p, s, key: jpeft.poly(p, rank=2, skills=3, sites=s, key=key),
        lambda params, sites: sum(n * 3 * (1 + 2 * (i + o)) for n, i, o in _kernels(sites)),
        exceptions=NO_WEIGHTS,
    ),
    Method(
        "mhr",
        lambda p, s, key: jpeft.poly(p, rank=2, skills=3, splits=4, alpha=2, sites=s, key=key),
        lambda params, sites: sum(n * 3 * (4 + 2 * (i + o)) for n, i, o in _kernels(sites)),
        model="encoder",
        exceptions=NO_WEIGHTS,
    ),
    Method(
        "fusion",
        lambda p, s, key: jpeft.fuse(_adapters(p, s, key), sites=s),
        lambda params, sites: LAYERS * 2 * (3 * 16**2 + 16),
        exceptions=NO_WEIGHTS | {"identity": "it starts from adapters that have trained"},
    ),
    *(
        Method(
            name,
            lambda p, s, key, o=options: jpeft.reft(p, rank=3, sites=s, key=key, **o),
            lambda params, sites: LAYERS * 3 * (16 + 16 + 1),
            model=model,
            exceptions=NO_WEIGHTS | exceptions,
        )
        for name, model, options, exceptions in (
            ("loreft", "decoder", {}, REFT),
            ("loreft_identity", "encoder", {"init": "identity", "positions": "f2"}, {}),
            ("noreft", "decoder", {"method": "noreft", "positions": "l3"}, REFT),
            ("direft", "decoder", {"method": "direft", "positions": "all"}, REFT),
        )
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
        "prefix_network",
        lambda p, s, key: jpeft.prefix(p, length=3, width=5, sites=s, key=key),
        lambda params, sites: 3 * 8 + 8 * 5 + 5 + LAYERS * (5 + 1) * 2 * 8,
        exceptions=NO_WEIGHTS | {"identity": STARTS_ELSEWHERE},
    ),
    Method(
        "llama_adapter",
        lambda p, s, key: jpeft.llama_adapter(p, length=3, sites=s, key=key),
        lambda params, sites: LAYERS * (3 * 16 + 1),
        exceptions=NO_WEIGHTS,
    ),
    Method(
        "mam",
        lambda p, s, key: jpeft.mam(p, length=3, prefix_width=None, width=4, sites=s, key=key),
        lambda params, sites: LAYERS * (2 * 3 * 8 + 2 * 4 * 16 + 4 + 16),
        exceptions=NO_WEIGHTS | {"identity": STARTS_ELSEWHERE},
    ),
    Method(
        "unipelt",
        lambda p, s, key: jpeft.unipelt(p, rank=2, length=3, prefix_width=5, width=4, sites=s, key=key),
        lambda params, sites: _unipelt(8) + 3 * 8 + 8 * 5 + 5 + LAYERS * (5 + 1) * 2 * 8,
        exceptions=NO_WEIGHTS | {"identity": STARTS_ELSEWHERE},
    ),
    Method(
        "unipelt_encoder",
        lambda p, s, key: jpeft.unipelt(p, rank=2, length=3, prefix_width=None, width=4, sites=s, key=key),
        lambda params, sites: _unipelt(16) + LAYERS * 2 * 3 * 16,
        model="encoder",
        exceptions=NO_WEIGHTS | {"identity": STARTS_ELSEWHERE},
    ),
    Method(
        "ladder",
        lambda p, s, key: jpeft.ladder(p, model=subject(scan="layers" in p).model, reduction=2, key=key),
        lambda params, sites: LAYERS * (READER + 192 + 3 * 8 * 16 + 2 * 8 + 1) + READER + 8 + 8 * 16 + 16,
        exceptions=NO_WEIGHTS | SIDE_NETWORK,
    ),
    Method(
        "ladder_encoder",
        lambda p, s, key: jpeft.ladder(p, model=subject("encoder", "layers" in p).model, reduction=2, key=key),
        lambda params, sites: (
            LAYERS * (READER + 4 * (8 + 1) * 8 + 2 * 8 * 16 + 16 + 8 + 4 * 8 + 1)
            + READER + (12 + 2) * 8 + 2 * 8 + 8 * 16 + 16
        ),
        model="encoder",
        exceptions=NO_WEIGHTS | SIDE_NETWORK,
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
        "intrinsic_prompt",
        lambda p, s, key: jpeft.intrinsic_prompt(p, decoder=_decoder(5, 7, 4 * 16), length=4, key=key),
        lambda params, sites: 5,
        exceptions=NO_WEIGHTS | {"identity": STARTS_ELSEWHERE},
    ),
    Method(
        "cpt",
        lambda p, s, key: jpeft.cpt(p, ids=[9, 3, 4, 5, 7], types=[0, 1, 2, 3, 4], epsilon=9.0),
        lambda params, sites: 3 * 16,
        exceptions=NO_WEIGHTS | {"identity": STARTS_ELSEWHERE},
    ),
    Method(
        "prompt_placeholder",
        lambda p, s, key: jpeft.prompt(p, length=1, placeholder=0, key=key),
        lambda params, sites: 16,
        exceptions=NO_WEIGHTS | {"identity": "another embedding is in the place of a token"},
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
    Method(
        "stack",
        _stack(lambda p, s, key: jpeft.lora(p, rank=3, alpha=6, sites=s, key=key)),
        lambda params, sites: 2 * _low_rank(3)(params, sites),
        exceptions=SIDE_BY_SIDE,
    ),
    Method(
        "stack_of_bottlenecks",
        _stack(lambda p, s, key: jpeft.bottleneck(p, width=3, sites=s, key=key)),
        lambda params, sites: 2 * _bottleneck(3, [(16, 16)] * 2)(params, sites),
        exceptions=NO_WEIGHTS | SIDE_BY_SIDE,
    ),
]
