"""What trains, and training it."""

import jax
import optax

import jpeft
from jpeft._targets import named_leaves


def trained_paths(params):
    trainable, _ = jpeft.partition(params)
    return {name for name, x in named_leaves(trainable).items() if jax.tree.leaves(x)}


def train(loss, tree, steps=3):
    """`tree` after steps of AdamW with weight decay."""
    tx = optax.adamw(1e-2, weight_decay=0.1)
    state, slope = tx.init(tree), jax.jit(jax.grad(loss))
    for _ in range(steps):
        with jax.numpy_dtype_promotion("standard"):  # Optax counts steps in integers
            updates, state = tx.update(slope(tree), state, tree)
        tree = optax.apply_updates(tree, updates)
    return tree
