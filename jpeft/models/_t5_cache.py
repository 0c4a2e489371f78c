"""What a T5's decoder has seen, of its own tokens and of the encoder's."""

from flax import struct
from jax import Array

from ._cache import Cache
from ._masks import default_positions


@struct.dataclass
class T5Cache:
    """What the decoder has seen; immutable, every method returns another.

    **Fields:**

    - `tokens`: keys and values of its own tokens.
    - `source`: those of the encoder's output, once it has been seen.
    """

    tokens: Cache
    source: Cache | None = None

    @property
    def filled(self) -> bool:
        """Whether a call has written to it."""
        return self.tokens.filled

    @property
    def end(self) -> Array:
        """The next free slot."""
        return self.tokens.end

    def reserve(self, valid: Array) -> "T5Cache":
        """With room for the decoder's next tokens, of which those are to be seen that are valid (batch, count)."""
        positions = default_positions(valid.shape[1], None, self.tokens)
        return self.replace(tokens=self.tokens.reserve(positions, valid))

    def close(self, count: int) -> "T5Cache":
        """After the layers have written `count` tokens."""
        return T5Cache(self.tokens.close(count), self.source.close(0))
