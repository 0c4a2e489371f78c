"""What every term of low rank is: two factors, and a product through them."""

import jax

from .._node import Branch, Static
from .._operands import dropout as drop


class LowRank(Branch):
    r"""$W' = W + s\,L R$; on activations $y = x W + s\,\mathrm{drop}(x) L R$.

    $L$ and $R$ are the fields `a` and `b` where a subclass says nothing else.
    """

    scale: Static[float] = 1.0
    dropout: Static[float] = 0.0

    @property
    def left(self) -> jax.Array:
        """$L$ `(in, rank)`."""
        return self.a

    @property
    def right(self) -> jax.Array:
        """$R$ `(rank, out)`."""
        return self.b

    def weight(self, w):
        return w + self.scale * (self.left @ self.right)

    def branch(self, x, key):
        return self.scale * (drop(x, self.dropout, key) @ self.left) @ self.right
