"""What acts on hidden states: a term that is added where a module returns them."""

import abc
from typing import Any, Literal

import jax

from .._node import Additive, Static, cast


class Hidden(Additive):
    r"""$y' = y + f(h)$, where a module returned $y$ for $x$. Subclasses say what $f$ is.

    **Fields:**

    - `at`: $h = y$ for `"output"`, and $h = x$ for `"input"`: in parallel with the module. `"norm"` stands beside a
      norm $N$ that comes after a residual sum, and has its sum normed once more: $y' = N(x + f(N(x)))$.
    """

    at: Static[Literal["output", "input", "norm"]] = "output"
    dropout: Static[float] = 0.0

    @abc.abstractmethod
    def change(self, h: jax.Array, key: jax.Array | None) -> jax.Array:
        """$f(h)$: `(..., in)` -> `(..., out)`, in the dtype of `h`. `key` is there when dropout is on."""

    def within(self, dtype: Any) -> "Hidden":
        """The node as a computation in `dtype` has it."""
        return cast(self, dtype)

    def around(self, call, key, *args, **kwargs):
        result = call(*args, **kwargs)
        y, *rest = result if isinstance(result, tuple) else (result,)
        h = y if self.at != "input" else args[0] if args else next(iter(kwargs.values()))
        change = self.within(h.dtype).change(h, key).astype(y.dtype)
        y = call(args[0] + change, *args[1:], **kwargs) if self.at == "norm" else y + change
        return (y, *rest) if isinstance(result, tuple) else y
