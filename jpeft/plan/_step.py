"""The train step that is planned, of arrays that are never made."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .. import _sharding
from .._apply import apply
from .._division import replicated
from .._tree import combine, partition
from ..models import shardings


BATCH = ("data", "fsdp")  # the axes of the mesh that divide the batch


class Step(NamedTuple):
    """`function(trainable, opt_state, frozen, tokens) -> (trainable, opt_state, loss)` and its abstract arguments.

    These are `jax.ShapeDtypeStruct`s with their shardings. The first two arguments are used up.
    """

    function: Any
    trainable: Any
    opt_state: Any
    frozen: Any
    tokens: Any

    def lower(self) -> Any:
        """The step as it goes to the compiler."""
        mesh = self.tokens.sharding.mesh
        placed = jax.tree.map(lambda x: x.sharding, (self.trainable, self.opt_state))
        jitted = jax.jit(self.function, donate_argnums=(0, 1), out_shardings=(*placed, replicated(mesh)))
        with jax.set_mesh(mesh):  # by which the model keeps its activations divided along the batch
            return jitted.lower(self.trainable, self.opt_state, self.frozen, self.tokens)


def abstract_step(
    model: Any, base: Any, transform: Callable, mesh: Mesh, *, batch_size: int, length: int, adapter_sharding: str
) -> Step:
    """AdamW on what `transform` lets train, with the gradient of the mean next-token loss.

    Args:
      model: a `jpeft.models.Decoder`.
      base: the shapes of its parameters.
      transform: `base -> params`.
      mesh: with the axes data, fsdp and tensor.
      batch_size, length: the integer tokens are (batch_size, length).
    """
    params = jax.eval_shape(transform, base)
    how = _sharding.shardings(params, shardings(base, mesh), adapter_sharding=adapter_sharding)
    trainable, frozen = partition(_sharding.shard(params, how))
    tx = optax.adamw(1e-4)
    placed = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    opt_state = optax.tree_map_params(
        tx, lambda x, like: placed(x, like.sharding), jax.eval_shape(tx.init, trainable), trainable,
        transform_non_params=lambda x: placed(x, replicated(mesh)),
    )  # fmt: skip
    rows = NamedSharding(mesh, PartitionSpec(BATCH))
    tokens = jax.ShapeDtypeStruct((batch_size, length), jnp.int32, sharding=rows)

    def step(trainable, opt_state, frozen, tokens):
        def loss(trainable):
            params = combine(trainable, frozen)
            return jnp.mean(apply(model, {"params": params}, tokens, labels=tokens))

        value, gradients = jax.value_and_grad(loss)(trainable)
        updates, opt_state = tx.update(gradients, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, value

    return Step(step, trainable, opt_state, frozen, tokens)
