"""A change of every entry: full fine-tuning that leaves its base as it is."""

import abc

import jax
import jax.numpy as jnp

from .._node import Frozen, Reparam, Static, Trainable
from .._operands import fold_in
from .._targets import Option, Sites, Targets
from .._tree import Params, transform, wrap


class Dense(Reparam):
    """$W' = W + D$ with a $D$ of the size of $W$, which can be looked at, and made sparse."""

    @property
    @abc.abstractmethod
    def change(self) -> jax.Array:
        """$D$ `(in, out)`."""

    def weight(self, w):
        return w + self.change


class Delta(Dense):
    r"""$W' = W + D$; with mixout, in calls with a key, $W' = W + D \odot m / (1 - p)$ with $m \sim Bernoulli(1 - p)$.

    So every step puts entries back to where they started, at the rate $p$: Lee et al.,
    [Mixout](https://arxiv.org/abs/1909.11299), ICLR 2020.
    """

    values: Trainable[jax.Array, "in out"]
    kept: Frozen[jax.Array | None, "in out"] = None  # m, within a call that draws it
    mixout: Static[float] = 0.0

    @property
    def change(self):
        if self.kept is None:
            return self.values
        return jnp.where(self.kept, self.values / (1 - self.mixout), jnp.zeros_like(self.values))

    def drawn(self, key):
        node = super().drawn(fold_in(key, 0))
        if not self.mixout:
            return node
        return node.replace(kept=jax.random.bernoulli(key, 1 - self.mixout, self.values.shape))


@transform
def delta(
    params: Params,
    *,
    mixout: Option = 0.0,
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    """Add a trainable array to every targeted parameter, of any shape. See `Delta`.

    Unlike `unfreeze` it stands on quantized kernels and on other methods, and what has changed is there to be seen.

    **Arguments:**

    - `mixout`: the rate at which entries go back to where they started for one call, where `apply` is given a
      `"dropout"` key; a number, or a mapping from patterns to numbers.
    - `targets`, `sites`: which parameters. By default every one of floating point but the output head's.
    - `key`: not used: every change starts at zero.

    **Raises** `ValueError` for a rate outside `[0, 1)`, a pattern that matches nothing, and for parameters that are no
    floating-point numbers.
    """

    def new(key, w, *, mixout):
        if not 0 <= mixout < 1:
            raise ValueError(f"A rate of mixout is in [0, 1), not {mixout}.")
        return Delta(values=jnp.zeros(w.shape), mixout=mixout)

    return wrap(params, new, targets=targets, sites=sites, key=key, entrywise=True, mixout=mixout)
