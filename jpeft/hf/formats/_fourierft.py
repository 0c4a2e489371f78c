"""FourierFT. Files have the seed of torch's generator for the places: whole numbers, which are made here as there."""

import functools

import numpy as np

from ...reparam._fourierft import FourierFT
from .._modules import Module
from ._format import Config, Format, Shapes, Tensors, linear, plain, positive


C = "fourierft_spectrum"
LARGE = (2**32 - 1) // 20
SEEDS = range(10_000)  # among which the one of given places is looked for


def shapes(m: Module, config: Config, tensors: Tensors) -> Shapes:
    return {C: (config["n_frequency"],)}


def read(m: Module, config: Config, tensors: Tensors) -> list:
    count, size = config["n_frequency"], m.inputs * m.outputs
    if count > size:
        raise ValueError(f"{count} frequencies are more than {m.inputs} inputs times {m.outputs} outputs")
    outputs, inputs = np.divmod(permuted(config["random_loc_seed"], size, count), m.inputs)
    indices = (inputs * m.outputs + outputs).astype(np.int32)
    return [FourierFT(c=tensors[C], indices=indices, shape=(m.inputs, m.outputs), scale=float(config["scaling"]))]


def write(m: Module, nodes: list) -> tuple[Tensors, Config]:
    (node,) = nodes
    linear(m, "FourierFT", conv1d=True)
    seed = _seed(tuple(node.indices.tolist()), m.inputs, m.outputs)
    if seed is None:
        raise ValueError(
            f"PEFT has no places of frequencies, but a seed of torch's generator for them, and none below {len(SEEDS)} "
            "makes these. `jpeft.hf.save` writes the whole model"
        )
    return {C: node.c}, {"n_frequency": node.c.size, "random_loc_seed": seed, "scaling": plain(node.scale)}


@functools.lru_cache(maxsize=64)  # kernels of one shape have the same places
def _seed(indices: tuple[int, ...], d_in: int, d_out: int) -> int | None:
    """The seed of places, PEFT's own first."""
    wanted = [d_in * (i % d_out) + i // d_out for i in indices]
    drawn = lambda seed, count: permuted(seed, d_in * d_out, count).tolist()
    seeds = (777, *SEEDS)
    fits = lambda seed, count: drawn(seed, count) == wanted[:count]
    return next((s for s in seeds if fits(s, min(2, len(wanted))) and fits(s, len(wanted))), None)


def permuted(seed: int, size: int, count: int) -> np.ndarray:
    """The first `count` of `torch.randperm(size, generator=torch.Generator().manual_seed(seed))`."""
    if size >= LARGE:
        raise ValueError(f"of {LARGE} numbers and more torch draws places otherwise, which is not done here")
    draws = np.random.RandomState(seed & 0xFFFFFFFF).randint(0, 2**32, count, np.uint32)  # the same twister
    moved: dict[int, int] = {}
    found = np.empty(count, np.int64)
    for n, draw in enumerate(draws.tolist()):
        place = n + draw % (size - n)
        found[n], moved[place] = moved.get(place, place), moved.get(n, n)
    return found


FOURIERFT = Format(
    peft_type="FOURIERFT",
    nodes=(FourierFT,),
    bias="fourier_only",
    shapes=shapes,
    read=read,
    write=write,
    ends=(C,),
    fields={"n_frequency": 1000, "scaling": 150.0, "random_loc_seed": 777, "n_frequency_pattern": {}},
    unused=frozenset({"init_weights"}),
    patterns={"n_frequency": "n_frequency_pattern"},
    check=lambda config: positive(config, "n_frequency", patterns="n_frequency_pattern"),
)
