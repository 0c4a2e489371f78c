"""Intrinsic prompt tuning: a prompt as a point of a small space, which the prompts of other tasks have told."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from .._node import Frozen, Trainable
from .._targets import TABLE, Targets
from .._tree import Params, default, transform
from ..offline._run import Running, compiled, run
from ._prompt import SoftPrompt, put_prompt
from ._ptuning import uniform


Layers = tuple[tuple[jax.Array, jax.Array], ...]  # of each its kernel (in, out) and bias (out,); tanh in between


class IntrinsicPrompt(SoftPrompt):
    r"""$P = \mathrm{Dec}(z)$, row after row: the decoder is frozen, and the few numbers $z$ train.

    Qin et al., [Exploring Universal Intrinsic Task Subspace via Prompt Tuning](https://arxiv.org/abs/2110.07867), 2021.
    """

    z: Trainable[jax.Array]  # (dimension,)
    decoder: Frozen[Layers]  # from (dimension,) to (length * features,)

    def prompt(self, tasks):
        return _layers(self.decoder, self.z[None]).reshape(self.length, -1)


class Subspace(NamedTuple):
    """What `fit_subspace` returns.

    **Fields:**

    - `encoder`: a linear layer, a kernel and its bias.
    - `decoder`: two layers, with a tanh in between.
    """

    encoder: Layers
    decoder: Layers

    def encode(self, prompts: jax.Array) -> jax.Array:
        """The points of prompts: `(tasks, length, features)` -> `(tasks, dimension)`."""
        return _layers(self.encoder, prompts.reshape(len(prompts), -1).astype(jnp.float32))

    def decode(self, z: jax.Array) -> jax.Array:
        """The prompts at points, row after row: `(tasks, dimension)` -> `(tasks, length * features)`."""
        return _layers(self.decoder, z)


def _layers(layers: Layers, x: jax.Array) -> jax.Array:
    for n, (kernel, bias) in enumerate(layers):
        x = (jnp.tanh(x) if n else x) @ kernel + bias[None]
    return x


def fit_subspace(
    batches: Iterable[Any],
    *,
    dimension: int = 10,
    width: int = 768,
    optimizer: optax.GradientTransformation,
    distillation: Callable[[jax.Array, Any], jax.Array] | None = None,
    weight: float = 200.0,
    key: jax.Array | None = None,
    **running: Unpack[Running],
) -> Subspace:
    r"""A space of few dimensions in which the prompts of many tasks lie, by a step for every batch of them.

    An auto-encoder learns to make the prompts again, $\hat P = \mathrm{Dec}(\mathrm{Enc}(P))$, with the loss

    $$w\,\mathrm{mean}\,(\hat P - P)^2 + \mathrm{distillation}(\hat P)$$

    **Arguments:**

    - `batches`: arrays `(tasks, length, features)`, of prompts that `prompt` and training have made; with a
      `distillation` pairs of these and of what goes with them, such as examples of the tasks.
    - `dimension`: of the space.
    - `width`: of the decoder's hidden layer.
    - `optimizer`: an Optax one.
    - `distillation`: `(prompts, what goes with them)` to how badly a model does with $\hat P$, a number.
    - `weight`: $w$.
    - `key`: for the auto-encoder's start; `jax.random.key(0)` if left out.
    - `running`: `progress`, `resume` and `save_every`. See the page on offline passes. Of another optimizer or
      `distillation` only the state and the batches can be told.

    **Raises** `ValueError` for a dimension or a width below one, for batches that are no prompts, if there are none,
    and for a `resume` of another pass.
    """
    if dimension < 1 or width < 1:
        raise ValueError(f"A subspace has at least one dimension, and so has its decoder: {dimension=}, {width=}.")
    first, batches = _peeked(batches)
    shape = jnp.shape(first if distillation is None else first[0])
    if len(shape) != 3:
        raise ValueError(f"A batch is of prompts (tasks, length, features), and a pair with a distillation: {shape=}.")

    @compiled
    def step(carry, _, batch):
        prompts, examples = (batch, None) if distillation is None else batch

        def loss(subspace):
            made = subspace.decode(subspace.encode(prompts)).reshape(prompts.shape)
            error = weight * jnp.mean(jnp.square(made - prompts.astype(jnp.float32)))
            return error if distillation is None else error + distillation(made, examples)

        subspace, state = carry
        updates, state = optimizer.update(jax.grad(loss)(subspace), state, subspace)
        return optax.apply_updates(subspace, updates), state

    start = _start(default(key), shape[1] * shape[2], dimension, width)
    options = {"dimension": dimension, "width": width, "weight": weight}
    carry = start, optimizer.init(jax.tree.map(jnp.copy, start))
    return run(step, carry, {}, batches, what="fit_subspace", options=options, **running)[0]


def _peeked(batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first batch, and all of them."""
    if isinstance(batches, Sequence) and batches:
        return batches[0], batches  # their number is known
    rest = iter(batches)
    first = list(itertools.islice(rest, 1))
    if not first:
        raise ValueError("`fit_subspace` has no batches.")
    return first[0], itertools.chain(first, rest)


def _start(key: jax.Array, size: int, dimension: int, width: int) -> Subspace:
    keys = jax.random.split(key, 3)
    sizes = (size, dimension), (dimension, width), (width, size)
    encoder, *decoder = (uniform(k, i, (i, o), (o,)) for k, (i, o) in zip(keys, sizes, strict=True))
    return Subspace((encoder,), tuple(decoder))


@transform
def intrinsic_prompt(
    params: Params,
    *,
    decoder: Layers,
    length: int = 20,
    init: jax.Array | None = None,
    placeholder: int | None = None,
    targets: Targets = TABLE,
    within: str = "",
    key: jax.Array | None = None,
) -> Params:
    """Put a prompt before every sequence, or into it, of which only the place in a subspace trains. See the node.

    After training `collapse` leaves the embeddings alone: a `Prompt`.

    **Arguments:**

    - `decoder`: of the `Subspace` that `fit_subspace` returns; or any layers, as `((kernel, bias), ...)`, that make
      `length` embeddings of `(dimension,)` numbers, with a tanh between them.
    - `length`: how many embeddings: as many as the prompts of the subspace have.
    - `init`: $z$ `(dimension,)`, such as `subspace.encode` has it of a prompt. Left out: normal, of deviation 0.02.
    - `placeholder`, `targets`, `within`: as for `prompt`.
    - `key`: for `init`; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for a decoder or an `init` of other sizes, and as `prompt` does.
    """
    dimension, size = decoder[0][0].shape[0], decoder[-1][0].shape[1]
    z = 0.02 * jax.random.normal(default(key), (dimension,)) if init is None else jnp.asarray(init, jnp.float32)
    if z.shape != (dimension,):
        raise ValueError(f"`init` has shape {z.shape}, and the decoder starts from {(dimension,)}.")

    def new(rows):
        if rows.size != size:
            raise ValueError(
                f"The decoder makes {size} numbers, and {length} embeddings of {rows.shape[1]} features are "
                f"{rows.size}: `length` must be that of the prompts of its subspace."
            )
        return IntrinsicPrompt(z=z, decoder=decoder)

    how = {"length": length, "init": "vocabulary", "placeholder": placeholder, "targets": targets, "within": within}
    return put_prompt(params, new, **how, key=key)
