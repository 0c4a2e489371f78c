"""Rotary position embedding, and the ways to stretch it over longer texts than a model was trained on."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jax import Array


def frequencies(theta: Any, width: int) -> Any:
    """`theta^(-2i / width)` for i = 0, ..., width / 2 - 1, float32."""
    # NumPy's power: a TPU's is inexact, and late positions show it.
    return 1 / theta ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))


class Scaling(Protocol):
    """A frozen dataclass with the fields that its `rope_type` has in Hugging Face's configs."""

    rope_type: ClassVar[str]

    def __call__(self, theta: float, width: int, length: Array) -> tuple[Any, Any]:
        """The frequencies (width / 2,) for a text of `length` tokens, and a factor for cosines and sines."""
        ...


@dataclasses.dataclass(frozen=True)
class Linear:
    """All frequencies are divided by `factor`: positions are interpolated. https://arxiv.org/abs/2306.15595."""

    rope_type: ClassVar[str] = "linear"
    factor: float

    def __call__(self, theta: float, width: int, length: Array) -> tuple[Any, Any]:
        return frequencies(theta, width) / self.factor, 1.0


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """`theta` grows with texts beyond `max_position_embeddings`: NTK-aware scaling. https://arxiv.org/abs/2309.00071.

    The longest text of a batch counts. Keys in a cache stay as they were rotated.
    """

    rope_type: ClassVar[str] = "dynamic"
    factor: float
    max_position_embeddings: int

    def __call__(self, theta: float, width: int, length: Array) -> tuple[Any, Any]:
        length = jnp.maximum(length, self.max_position_embeddings)
        growth = self.factor * length / self.max_position_embeddings - (self.factor - 1)
        growth **= width / (width - 2)
        return frequencies(theta * growth, width), 1.0


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Frequencies that turn less than `low_freq_factor` times in the original length are divided by `factor`, those
    that turn more than `high_freq_factor` times stay, and between them it goes linearly. https://arxiv.org/abs/2407.21783.
    """

    rope_type: ClassVar[str] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __call__(self, theta: float, width: int, length: Array) -> tuple[Any, Any]:
        fast = frequencies(theta, width)
        turns = self.original_max_position_embeddings * fast / (2 * math.pi)
        share = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return share * fast + (1 - share) * fast / self.factor, 1.0


@dataclasses.dataclass(frozen=True)
class Yarn:
    """As `Llama3`, but linearly in the number of the frequency, and with a factor for cosines and sines, which is
    0.1 log(factor) + 1 where neither `attention_factor` nor `mscale` and `mscale_all_dim` give it.

    https://arxiv.org/abs/2309.00071.
    """

    rope_type: ClassVar[str] = "yarn"
    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float | None = 32.0  # turns in the original length
    beta_slow: float | None = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __call__(self, theta: float, width: int, length: Array) -> tuple[Any, Any]:
        # The number of the frequency that makes so many turns in the original length.
        turning = lambda turns: width * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / (
            2 * math.log(theta)
        )
        low, high = turning(self.beta_fast or 32.0), turning(self.beta_slow or 1.0)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        high += 0.001 if low == high else 0
        fast = frequencies(theta, width)
        share = 1 - np.clip((np.arange(width // 2, dtype=np.float32) - low) / (high - low), 0, 1)
        return share * fast + (1 - share) * fast / self.factor, self._attention_factor()

    def _attention_factor(self) -> float:
        scale = lambda m: 0.1 * m * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return scale(self.mscale) / scale(self.mscale_all_dim)
        return scale(1.0)


@dataclasses.dataclass(frozen=True)
class LongRope:
    """Each frequency is divided by a number of its own: `long_factor`'s for texts beyond the original length, else
    `short_factor`'s. https://arxiv.org/abs/2402.13753.

    The longest text of a batch counts. Keys in a cache stay as they were rotated: a text that is to grow beyond the
    original length is generated as transformers does only if it starts there.
    """

    rope_type: ClassVar[str] = "longrope"
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    factor: float  # how many times longer texts may be than the original length
    original_max_position_embeddings: int
    attention_factor: float | None = None

    def __call__(self, theta: float, width: int, length: Array) -> tuple[Any, Any]:
        original, fast = self.original_max_position_embeddings, frequencies(theta, width)
        long, short = (fast / np.array(x, np.float32) for x in (self.long_factor, self.short_factor))
        factor = self.attention_factor
        if factor is None:
            factor = math.sqrt(1 + math.log(self.factor) / math.log(original)) if self.factor > 1 else 1.0
        return jnp.where(length > original, long, short), factor


SCALINGS: dict[str, type[Scaling]] = {x.rope_type: x for x in (Linear, Dynamic, Llama3, Yarn, LongRope)}


class Reach(NamedTuple):
    """What a layer makes of positions."""

    window: int | None  # how far it sees; None: to the first token
    theta: float | None  # the base of its rotations; None: it does not rotate
    scaling: Scaling | None


def rotation(position_ids: Array, theta: float, width: int, scaling: Scaling | None = None) -> tuple[Array, Array]:
    """Cosines and sines of `position * frequency`, as `rotate` takes them.

    position_ids (batch or 1, seq) -> two arrays float32 (batch or 1, seq, 1, width / 2).
    """
    fast, factor = frequencies(theta, width), 1.0
    if scaling is not None:
        fast, factor = scaling(theta, width, jnp.max(position_ids).astype(jnp.float32) + 1)
    angles = position_ids[:, :, None, None].astype(jnp.float32) * jnp.asarray(fast, jnp.float32)[None, None, None, :]
    return factor * jnp.cos(angles), factor * jnp.sin(angles)


def rotations(reaches: Sequence[Reach], position_ids: Array, width: int) -> tuple[Array, Array]:
    """The `rotation` of each, stacked; no angle where `theta` is None."""
    still = jnp.zeros_like(position_ids)
    each = [rotation(still, 1.0, width) if r.theta is None else rotation(position_ids, r.theta, width, r.scaling)
            for r in reaches]  # fmt: skip
    cos, sin = zip(*each, strict=True)
    return jnp.stack(cos), jnp.stack(sin)


def rotate(x: Array, rotation: tuple[Array, Array]) -> Array:
    """Pairs entry i with entry i + width / 2 and turns each pair by its angle; entries beyond `width` stay.

    x (batch, seq, heads, width or more), rotation: cosines and sines, float32 (batch or 1, seq, 1, width / 2). The
    pairs are those of Hugging Face's Llama checkpoints. Source: https://arxiv.org/abs/2104.09864.
    """
    cos, sin = rotation
    first, second, rest = jnp.split(x.astype(jnp.float32), [cos.shape[-1], 2 * cos.shape[-1]], axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
