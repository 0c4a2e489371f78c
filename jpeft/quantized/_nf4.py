"""NF4 with double quantization: the frozen weights of QLoRA."""

import jax
import jax.numpy as jnp
import numpy as np

from .._node import Frozen
from .._targets import Option, Sites, Targets
from .._tree import Params, transform, wrap
from ._codes import Codes, grouped, pack, poison, unpack


LEVELS = np.float32([  # of QLoRA's appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def _dynamic_levels() -> np.ndarray:
    """The 256 levels of dynamic 8-bit numbers: 0, 1, and in each decade below it twice as many as in the next."""
    positive = [10.0 ** (e - 6) * np.convolve(np.linspace(0.1, 1, 2**e + 1), [0.5, 0.5], "valid") for e in range(7)]
    positive = np.concatenate(positive)
    return np.concatenate([-positive[::-1], [0.0], positive, [1.0]]).astype(np.float32)


DYNAMIC = _dynamic_levels()  # Dettmers, https://arxiv.org/abs/1511.04561
CHUNK = 256  # constants that share a constant


class NF4(Codes):
    r"""$W_{ij} \approx c_{gj}\,L[q_{ij}]$ with the 16 levels $L$ of 4-bit NormalFloat, -1, 0 and 1 among them.

    $c_{gj} = \max_{i \in g} |W_{ij}|$ is one constant for each block $g$ of 64 inputs of an output $j$. With double
    quantization it is kept as $c \approx m + d\,D[p]$: $m$ is the mean of the kernel's constants, $D$ the 256 levels of
    dynamic 8-bit numbers, and $d = \max |c - m|$ over 256 constants, output by output.

    4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits a weight; 4.5 without double quantization. The error is at most half the
    gap between two levels, 0.152 $c$, and that of $c$.

    These are QLoRA's numbers: where 64 divides `in`, codes and constants equal those of `bitsandbytes` for the torch
    weight `(out, in)` with `compress_statistics`. Elsewhere its blocks run on from one output to the next, and these do
    not. The order in which codes share bytes is another: see `pack`.

    Dettmers et al., [QLoRA: Efficient Finetuning of Quantized LLMs](https://arxiv.org/abs/2305.14314), NeurIPS 2023.
    """

    codes: Frozen[jax.Array, "in out"]  # uint8, two rows a byte
    absmax: Frozen[jax.Array, "group out"]  # c in float32, or p in uint8
    scale: Frozen[jax.Array | None, "chunk"] = None  # d, float32
    mean: Frozen[jax.Array | None, ""] = None  # m, float32

    def decode(self):
        levels = lookup(unpack(self.codes, len(self.absmax)))
        return (levels * self.constants()[:, None]).reshape(-1, self.codes.shape[1])

    def constants(self) -> jax.Array:
        """The blocks' constants, `(groups, out)` in float32."""
        if self.scale is None:
            return self.absmax
        d = jnp.repeat(self.scale, CHUNK)[: self.absmax.size].reshape(self.absmax.T.shape).T
        return jnp.asarray(DYNAMIC).at[self.absmax].get(mode="promise_in_bounds") * d + self.mean


def lookup(codes: jax.Array) -> jax.Array:
    """`LEVELS[codes]`: gathered on a GPU; elsewhere selected by the bits of the codes, without an array of indices."""

    def gather(codes):
        return jnp.asarray(LEVELS).at[codes].get(mode="promise_in_bounds")

    def select(codes):
        odd, *bits = (codes >> n & 1 for n in range(4))
        odd = odd.astype(jnp.float32)
        # Exact. To select among scalars is to broadcast them, and a scan that is differentiated keeps all those arrays.
        levels = [(1 - odd) * a + odd * b for a, b in zip(LEVELS[::2], LEVELS[1::2], strict=True)]
        for bit in bits:
            levels = [jnp.where(bit != 0, b, a) for a, b in zip(levels[::2], levels[1::2], strict=True)]
        return levels[0]

    return jax.lax.platform_dependent(codes, cuda=gather, rocm=gather, default=select)


def nearest(x: jax.Array, levels: np.ndarray) -> jax.Array:
    """The codes of the ascending `levels` nearest to `x`."""
    how = "compare_all" if len(levels) == 16 else "scan_unrolled"  # many comparisons fuse, very many do not
    return jnp.searchsorted((levels[1:] + levels[:-1]) / 2, x, method=how).astype(jnp.uint8)


def _quantize(key, w, *, block, double):
    w = grouped(w, block)
    absmax = poison(jnp.max(jnp.abs(w), axis=1), w)
    codes = pack(nearest(_over(w, absmax[:, None]), LEVELS))
    if not double:
        return NF4(codes=codes, absmax=absmax)
    mean = jnp.mean(absmax)
    flat = (absmax - mean).T.reshape(-1)
    chunks = jnp.pad(flat, (0, -len(flat) % CHUNK)).reshape(-1, CHUNK)
    scale = jnp.max(jnp.abs(chunks), axis=1)
    inner = nearest(_over(chunks, scale[:, None]), DYNAMIC).reshape(-1)[: len(flat)]
    return NF4(codes=codes, absmax=inner.reshape(absmax.T.shape).T, scale=scale, mean=mean)


def _over(x, absmax):  # with the reciprocal, as in bitsandbytes; 0 / 0 = 0
    return x * (1 / jnp.maximum(absmax, jnp.finfo(x.dtype).tiny))


@transform
def nf4(
    params: Params,
    *,
    block: Option = 64,
    double: Option = True,
    targets: Targets | None = None,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    """Round every targeted kernel to the 16 levels of 4-bit NormalFloat, as QLoRA does. See `NF4`.

    **Arguments:**

    - `block`: how many weights along the inputs share a constant, an even number. Where it does not divide the inputs,
      the last block is stored filled up.
    - `double`: whether the constants are quantized in their turn, to 8 bits. Each option is one value, or a mapping
      from patterns to values.
    - `targets`, `sites`: which kernels. By default every one but the output head.
    - `key`: not used; rounding is to the nearest code.

    **Raises** `ValueError` for a block that is odd or below one, for a kernel that is a node already, and for targets
    as `wrap` does.
    """
    how = {"block": block, "double": double}
    return wrap(params, _quantize, targets=targets, sites=sites, key=key, over_nodes=False, **how)
