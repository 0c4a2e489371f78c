"""The network and the batch on which PEFT started LoRA from data, and what it found. See make_data_driven.py."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

import jpeft


ARRAYS = dict(np.load(Path(__file__).parents[1] / "fixtures/data_driven/peft.npz"))
LAYERS = "0", "2"
PARAMS = {n: {"kernel": jnp.asarray(ARRAYS[f"weight_{n}"].T), "bias": jnp.asarray(ARRAYS[f"bias_{n}"])} for n in LAYERS}
X, Y = jnp.asarray(ARRAYS["x"]), jnp.asarray(ARRAYS["y"])


def network(params, x):
    layer = lambda n, x: x @ params[n]["kernel"] + params[n]["bias"][None]
    return layer("2", jnp.tanh(layer("0", x)))


def forward(params, x):
    return jpeft.apply(network, params, x)


def loss(params, batch):
    return jnp.sum(jnp.square(forward(params, batch[0]) - batch[1])) / 2


def peft(case, layer):
    """PEFT's A `(in, rank)`, B `(rank, out)` and scale."""
    return ARRAYS[f"{case}/{layer}/A"].T, ARRAYS[f"{case}/{layer}/B"].T, float(ARRAYS[f"{case}/{layer}/scale"])


def span(a):
    """The projection onto the columns of `a`."""
    q = np.linalg.qr(np.asarray(a))[0]
    return q @ q.T
