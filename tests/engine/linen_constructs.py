"""Constructs of Flax Linen."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from constructs import Construct, normal


TOKENS = jnp.array([[0, 3, 6, 3], [1, 2, 0, 5]])
D = 6  # the width of most models here


class Own(nn.Module):
    """A module with a parameter of its own, and an einsum string."""

    spec: str
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, *xs):
        return jnp.einsum(self.spec, *xs, self.param("w", nn.initializers.normal(), self.shape))


class Tied(nn.Module):
    """A table of embeddings that is the output head too."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(7, D)
        return embed.attend(jnp.tanh(nn.Dense(D, name="dense")(embed(tokens))))


class Attend(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Embed(7, D).attend(x)


class Fused(nn.Module):
    """Attention whose three projections are one, split after the product."""

    @nn.compact
    def __call__(self, x):
        q, k, v = jnp.split(nn.Dense(3 * D, name="qkv")(x), 3, axis=-1)
        return nn.softmax(q @ k.swapaxes(-1, -2)) @ v


class Setup(nn.Module):
    def setup(self):
        self.up = nn.Dense(10)
        self.layers = [nn.Dense(10), nn.Dense(5)]

    def __call__(self, x):
        x = self.up(x)
        for layer in self.layers:
            x = layer(jnp.tanh(x))
        return x


class Shared(nn.Module):
    """Two modules in one scope."""

    def setup(self):
        self.inner = Own("...i,io->...o", (D, 4))
        nn.share_scope(self, self.inner)
        self.v = self.param("v", nn.initializers.normal(), (4, D))

    def __call__(self, x):
        return self.inner(x) @ self.v


class Block(nn.Module):
    """`tanh(x W) V`, with the carry of a loop."""

    @nn.compact
    def __call__(self, x, _=None):
        return nn.Dense(D, name="out")(jnp.tanh(nn.Dense(5, name="up")(x))), None


class Around(nn.Module):
    """A transform of `Block`, or of any such module."""

    lift: Callable
    block: type[nn.Module] = Block

    @nn.compact
    def __call__(self, x):
        return self.lift(self.block)(name="block")(x, None)[0]


def scanned(block, axis=0, length=3):
    how = {"split_rngs": {"params": True}, "metadata_params": {nn.PARTITION_NAME: "layers"}}
    return nn.scan(block, variable_axes={"params": axis}, length=length, **how)


def repeated(block):
    """One block, three times."""
    return nn.scan(block, variable_broadcast="params", split_rngs={"params": False}, length=3)


def mapped(block, axis=0, in_axes=(0, None)):
    how = {"variable_axes": {"params": axis}, "split_rngs": {"params": True}, "axis_size": 3}
    return nn.vmap(block, in_axes=in_axes, **how)


class Mixture(nn.Module):
    """The mean of mapped blocks, with the carry of a loop."""

    @nn.compact
    def __call__(self, x, _=None):
        experts = mapped(Block)(name="experts")
        return jnp.mean(experts(jnp.stack([x, -x, 2 * x]), None)[0], axis=0), None


class Looped(nn.Module):
    """`nn.while_loop`, three times."""

    @nn.compact
    def __call__(self, x):
        block = Block(name="block")
        if self.is_initializing():
            return block(x)[0]
        body = lambda block, carry: (carry[0] + 1, block(carry[1])[0])
        return nn.while_loop(lambda _, carry: carry[0] < 3, body, block, (0, x))[1]


class Boxed(nn.Module):
    """A parameter that carries the names of mesh axes, with the carry of a loop."""

    box: Callable = nn.with_partitioning

    @nn.compact
    def __call__(self, x, _=None):
        init = self.box(nn.initializers.normal(), (None, "model"))
        return nn.Dense(D, kernel_init=init, name="dense")(x), None


def block(path="block", letters="io"):
    return {f"{path}/up/kernel": letters, f"{path}/out/kernel": letters}


X = normal(2, 4, D)
KERNEL = {"kernel": "io"}

LINEN: dict[str, Construct] = {
    "nn.Dense": Construct(nn.Dense(10), (X,), KERNEL),
    "nn.Dense, one output": Construct(nn.Dense(1), (X,), KERNEL),
    "nn.Dense, one input": Construct(nn.Dense(5), (normal(4, 1),), KERNEL),
    "nn.DenseGeneral": Construct(nn.DenseGeneral((2, 5), axis=(-2, -1)), (X,), {"kernel": "iioo"}),
    "nn.DenseGeneral, batched": Construct(nn.DenseGeneral(5, batch_dims=(0,)), (X,), {"kernel": "sio"}),
    "nn.MultiHeadDotProductAttention": Construct(
        nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8),
        (X,),
        {f"{name}/kernel": "ioo" for name in ("query", "key", "value")} | {"out/kernel": "iio"},
    ),
    "nn.MultiHeadDotProductAttention, one head": Construct(
        nn.MultiHeadDotProductAttention(num_heads=1, qkv_features=8),
        (X,),
        {f"{name}/kernel": "ioo" for name in ("query", "key", "value")} | {"out/kernel": "iio"},
    ),
    "nn.Einsum": Construct(nn.Einsum((2, D, 5), "bti,hio->bhto"), (X,), {"kernel": "oio"}),
    "param and einsum": Construct(Own("bti,hoi->btho", (2, 5, D)), (X,), {"w": "ooi"}),
    "einsum, output permuted": Construct(Own("bti,hio->ohtb", (2, D, 5)), (X,), {"w": "oio"}),
    "einsum of three": Construct(Own("bti,bto,oi->bt", (5, D)), (X, normal(2, 4, 5)), {"w": "oi"}),
    "nn.Conv 1-D": Construct(nn.Conv(5, (3,)), (X,), {"kernel": "iio"}),
    "nn.Conv 2-D": Construct(nn.Conv(5, (3, 2)), (normal(2, 5, 4, 3),), {"kernel": "iiio"}),
    "nn.Conv 1 x 1": Construct(nn.Conv(5, (1, 1)), (normal(2, 5, 4, 3),), {"kernel": "iiio"}),
    "nn.Conv, strided": Construct(nn.Conv(5, (3, 2), strides=(2, 1)), (normal(2, 5, 4, 3),), {"kernel": "iiio"}),
    "nn.Conv, dilated": Construct(nn.Conv(5, (3,), kernel_dilation=2, padding="CAUSAL"), (X,), {"kernel": "iio"}),
    "nn.ConvTranspose": Construct(nn.ConvTranspose(5, (3,), strides=(2,)), (X,), {"kernel": "iio"}),
    "nn.Embed": Construct(nn.Embed(7, D), (TOKENS,), {"embedding": "io"}),
    "nn.Embed.attend": Construct(Attend(), (X,), {"Embed_0/embedding": "oi"}),
    "nn.Embed, tied": Construct(Tied(), (TOKENS,), {"Embed_0/embedding": "io", "dense/kernel": "io"}),
    "fused QKV": Construct(Fused(), (X,), {"qkv/kernel": "io"}),
    "setup": Construct(Setup(), (X,), {f"{name}/kernel": "io" for name in ("up", "layers_0", "layers_1")}),
    "nn.share_scope": Construct(Shared(), (X,), {"w": "io", "v": "io"}),
    "nn.remat": Construct(Around(nn.remat), (X,), block()),
    "nn.scan": Construct(Around(scanned), (X,), block(letters="sio")),
    "nn.scan, axis 1": Construct(Around(partial(scanned, axis=1)), (X,), block(letters="iso")),
    "nn.scan of one": Construct(Around(partial(scanned, length=1)), (X,), block(letters="sio")),
    "nn.scan, broadcast": Construct(Around(repeated), (X,), block()),
    "nn.scan of remat": Construct(Around(lambda block: scanned(nn.remat(block))), (X,), block(letters="sio")),
    "nn.remat of scan": Construct(Around(lambda block: nn.remat(scanned(block))), (X,), block(letters="sio")),
    "nn.scan of scan": Construct(Around(lambda block: scanned(scanned(block))), (X,), block(letters="ssio")),
    "nn.vmap": Construct(Around(mapped), (normal(3, 4, D),), block(letters="sio")),
    "nn.vmap, axis 1": Construct(Around(partial(mapped, axis=1)), (normal(3, 4, D),), block(letters="iso")),
    "nn.vmap, one input": Construct(
        Around(partial(mapped, in_axes=(None, None))), (X,), block(letters="sio"), told=False
    ),
    "nn.scan of vmap": Construct(Around(lambda block: scanned(Mixture)), (X,), block("block/experts", "ssio")),
    "nn.while_loop": Construct(Looped(), (X,), block(), reverse=False),
    "nn.jit": Construct(Around(nn.jit), (X,), block()),
    "nn.scan of jit": Construct(Around(lambda block: scanned(nn.jit(block))), (X,), block(letters="sio")),
    "bfloat16": Construct(nn.Dense(10, dtype=jnp.bfloat16), (X,), KERNEL, tolerance=2**-7),
    "Partitioned": Construct(Boxed(nn.with_partitioning), (X,), {"dense/kernel": "io"}),
    "LogicallyPartitioned": Construct(Boxed(nn.with_logical_partitioning), (X,), {"dense/kernel": "io"}),
    "nn.scan of Partitioned": Construct(Around(scanned, Boxed), (X,), {"block/dense/kernel": "sio"}),
}
