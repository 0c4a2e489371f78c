"""What a construct is: a way in which a model uses its kernels, which the engine must see through."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jpeft


LORA = jpeft.lora(rank=2, alpha=3)


@dataclasses.dataclass(frozen=True)
class Construct:
    """A model, or a function of its parameters, with what to call it with and what the engine should find in it."""

    run: nn.Module | Callable
    args: tuple[jax.Array, ...]
    axes: Mapping[str, str]  # the letters of every kernel, by path
    shapes: Mapping[str, tuple[int, ...]] | None = None  # of a function's parameters
    told: bool = True  # whether `sites` can tell the letters
    reverse: bool = True  # whether JAX can differentiate it backward
    tolerance: float = 1e-5

    def variables(self, params: Any) -> Any:
        """What `run` is called with first."""
        return {"params": params} if isinstance(self.run, nn.Module) else params

    def abstract(self) -> Any:
        """The shapes of the parameters."""
        if not isinstance(self.run, nn.Module):
            return {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in self.shapes.items()}
        return jax.eval_shape(self.run.init, jax.random.key(0), *self.args)["params"]

    def sites(self) -> Any:
        return jpeft.sites(self.run, self.variables(self.abstract()), *self.args)

    def adapted(self, method: Callable = LORA) -> Any:
        """Random parameters with the method's node on every kernel, whose own arrays are random too."""
        escaped = {re.escape(path): letters for path, letters in self.axes.items()}
        how = {"targets": list(escaped), "sites": self.sites()} if self.told else {"targets": escaped}
        return random(jax.eval_shape(lambda params: method(params, **how), self.abstract()))

    def apply(self, params: Any) -> Any:
        """With the nodes at work."""
        return jpeft.apply(self.run, self.variables(params), *self.args)

    def plain(self, params: Any) -> Any:
        """The model itself, on plain parameters."""
        run = self.run.apply if isinstance(self.run, nn.Module) else self.run
        return run(self.variables(params), *self.args)


def normal(*shape: int) -> jax.Array:
    """The same standard normal numbers for the same shape."""
    return jnp.asarray(np.random.default_rng(shape).standard_normal(shape, np.float32))


def random(shapes: Any) -> Any:
    """Arrays of the given shapes, no two alike: normal numbers of variance 1/4, or zeros and ones."""
    rng = np.random.default_rng(0)

    def one(x):
        whole = jnp.issubdtype(x.dtype, jnp.integer)
        return jnp.asarray(rng.integers(0, 2, x.shape) if whole else rng.standard_normal(x.shape) / 2, x.dtype)

    return jax.tree.map(one, shapes)


def close(got: Any, want: Any, tolerance: float) -> None:
    """That two trees are equal to `tolerance`, relative to the largest entry of each array."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(b).all()
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max(initial=0))
