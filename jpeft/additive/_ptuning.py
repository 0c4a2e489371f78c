"""P-tuning: a prompt that a small network makes."""

import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from .._node import Trainable
from .._targets import TABLE, Targets
from .._tree import Params, default, transform
from ._prompt import SoftPrompt, put_prompt


class PTuning(SoftPrompt):
    r"""$P = \mathrm{MLP}(\mathrm{LSTM}(E))$, or $\mathrm{MLP}(E)$: the rows $E$ train, and the network.

    The MLP has a ReLU between its layers. The LSTM reads in both directions; its gates are, in this order, input,
    forget, cell and output.

    Liu et al., [GPT Understands, Too](https://arxiv.org/abs/2103.10385), 2021.
    """

    rows: Trainable[jax.Array]  # (length, features)
    mlp: Trainable[Any]  # of every layer (kernel (in, out), bias (out,))
    lstm: Trainable[Any] = ()  # of every layer two directions: (input (in, 4 width), state (width, 4 width), bias)

    def prompt(self, tasks):
        x = self.rows
        for layer in self.lstm:
            forward, backward = layer
            x = jnp.concatenate([_lstm(x, *forward), _lstm(x, *backward, reverse=True)], axis=1)
        for n, (kernel, bias) in enumerate(self.mlp):
            x = (jax.nn.relu(x) if n else x) @ kernel + bias[None]
        return x


def _lstm(x: jax.Array, input: jax.Array, state: jax.Array, bias: jax.Array, reverse: bool = False) -> jax.Array:
    """The states (length, width) of an LSTM that reads x (length, in)."""

    def step(carry, gates):
        h, c = carry
        i, f, g, o = jnp.split(gates + h @ state, 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    gates = x @ input + bias[None]
    zeros = jnp.zeros_like(gates[0, : len(state)])
    return jax.lax.scan(step, (zeros, zeros), gates, reverse=reverse)[1]


@transform
def ptuning(
    params: Params,
    *,
    length: int = 20,
    width: int | None = None,
    encoder: Literal["mlp", "lstm"] = "mlp",
    layers: int = 2,
    init: Any = "vocabulary",
    placeholder: int | None = None,
    targets: Targets = TABLE,
    within: str = "",
    key: jax.Array | None = None,
) -> Params:
    r"""Put `length` embeddings that a trainable network makes before every sequence, or into it. See `PTuning`.

    After training `collapse` leaves the embeddings alone: a `Prompt`.

    **Arguments:**

    - `length`: how many.
    - `width`: of the network; that of the embeddings if left out.
    - `encoder`: `"mlp"`: three layers. `"lstm"`: a bidirectional LSTM, and two layers.
    - `layers`: of the LSTM.
    - `init`: what the network starts from, $E$: as for `prompt`.
    - `placeholder`, `targets`, `within`: as for `prompt`.
    - `key`: for `init` and the network; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for an unknown encoder, a width or a number of layers below one, and as `prompt` does.
    """
    if encoder not in ("mlp", "lstm") or layers < 1 or (width is not None and width < 1):
        found = f"{encoder=}, {width=} and {layers=}"
        raise ValueError(f"P-tuning is by an 'mlp' or an 'lstm', whose sizes are at least 1, not {found}.")
    key_rows, key_mlp, key_lstm = jax.random.split(default(key), 3)

    def new(rows):
        rows = rows.astype(jnp.float32)
        features = rows.shape[1]
        inner = width or features
        sizes = (features, inner, inner, features) if encoder == "mlp" else (2 * inner, 2 * inner, features)
        pairs = list(itertools.pairwise(sizes))
        keys = jax.random.split(key_mlp, len(pairs))
        mlp = tuple(uniform(k, i, (i, o), (o,)) for k, (i, o) in zip(keys, pairs, strict=True))

        def layer(n, key):
            shapes = (2 * inner if n else features, 4 * inner), (inner, 4 * inner), (4 * inner,)
            return tuple(uniform(k, inner, *shapes) for k in jax.random.split(key))

        keys = jax.random.split(key_lstm, layers if encoder == "lstm" else 0)
        return PTuning(rows=rows, mlp=mlp, lstm=tuple(layer(n, k) for n, k in enumerate(keys)))

    how = {"length": length, "init": init, "placeholder": placeholder, "targets": targets, "within": within}
    return put_prompt(params, new, **how, key=key_rows)


def uniform(key: jax.Array, size: int, *shapes: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """The arrays of a layer as torch's start: between -1 and 1 over the root of a size."""
    keys = jax.random.split(key, len(shapes))
    return tuple(jax.random.uniform(k, s, minval=-1, maxval=1) / size**0.5 for k, s in zip(keys, shapes, strict=True))
