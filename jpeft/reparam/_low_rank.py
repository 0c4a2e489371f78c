"""What every term of low rank is: two factors, and a product through them."""

import abc

import jax

from .._node import Branch, Static
from .._operands import dropout as drop


class LowRank(Branch):
    r"""$W' = W + s\,L R$; on activations $y = x W + s\,\mathrm{drop}(x) L R$. Subclasses say what $L$ and $R$ are."""

    scale: Static[float] = 1.0
    dropout: Static[float] = 0.0

    @property
    @abc.abstractmethod
    def left(self) -> jax.Array:
        """$L$ `(in, rank)`."""

    @property
    @abc.abstractmethod
    def right(self) -> jax.Array:
        """$R$ `(rank, out)`."""

    def weight(self, w):
        return w + self.scale * (self.left @ self.right)

    def branch(self, x, key):
        return self.scale * (drop(x, self.dropout, key) @ self.left) @ self.right
