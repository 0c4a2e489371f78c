"""AdaMix: adapters whose experts are chosen at random in training, and are one of the experts' mean afterwards."""

import jax
import jax.numpy as jnp

from .._kernel import stacked
from .._node import Static, Trainable
from .._operands import fold_in
from .._targets import Option, Sites, Targets, one_of
from .._tree import Params, attach, transform
from ..places import FEED_FORWARD_OUTPUT
from ._bottleneck import STARTS, Bottleneck, activation_of, arrays
from ._hidden import Hidden


class AdaMix(Hidden):
    r"""$f(h) = s\,(\phi(h D_i + d_i)\,U_j + u_j)$, in a call with a key with $i$ and $j$ at random. See `Hidden`.

    Every module in every call has an $i$ and a $j$ of its own. Without a key it is the `Bottleneck` of the means of all
    $D_i$, $d_i$, $U_j$ and $u_j$.

    Wang et al., [AdaMix: Mixture-of-Adaptations for Parameter-efficient Model Tuning](https://arxiv.org/abs/2205.12410),
    EMNLP 2022.
    """

    down: Trainable[jax.Array, "experts_down in width"]
    down_bias: Trainable[jax.Array, "experts_down width"]
    up: Trainable[jax.Array, "experts_up width out"]
    up_bias: Trainable[jax.Array, "experts_up out"]
    scale: Static[float] = 1.0
    activation: Static[str] = "gelu"

    @property
    def random(self):
        return True

    def change(self, h, key):
        return self.routed(key).change(h, fold_in(key, 2))

    def routed(self, key: jax.Array | None) -> Bottleneck:
        """The adapter that a call with the key goes through."""
        key_down, key_up = fold_in(key, 0), fold_in(key, 1)
        return Bottleneck(
            down=expert(self.down, -3, key_down),
            down_bias=expert(self.down_bias, -2, key_down),
            up=expert(self.up, -3, key_up),
            up_bias=expert(self.up_bias, -2, key_up),
            scale=self.scale,
            activation=self.activation,
            at=self.at,
            dropout=self.dropout,
        )

    def at_rest(self, task=None):
        return self.routed(None)


def expert(x: jax.Array, axis: int, key: jax.Array | None) -> jax.Array:
    """One of the experts on `axis`, counted from the last, at random; their mean without a key.

    For every place on the axes before it, one by itself.
    """
    if key is None:
        return jnp.mean(x, axis)
    chosen = jax.random.randint(key, x.shape[:axis], 0, x.shape[axis])
    return stacked(lambda x, n: jnp.take(x, n, axis=0), chosen.ndim)(x, chosen)


def check_experts(experts: int, shared: tuple[bool, bool]) -> tuple[int, int]:
    """How many experts the first and the second projection have, of which one or none is shared.

    **Raises** `ValueError` for fewer than one, and where both are shared.
    """
    if experts < 1:
        raise ValueError(f"A mixture has at least one expert, not {experts=}.")
    if all(shared):
        raise ValueError("With both projections shared there is nothing to mix: leave one of the two options out.")
    first, second = (1 if one else experts for one in shared)
    return first, second


@transform
def adamix(
    params: Params,
    *,
    experts: Option = 4,
    width: Option = 16,
    sharing_down: bool = False,
    sharing_up: bool = True,
    distinct: bool = False,
    init: str = "zero",
    activation: str = "gelu",
    scale: Option = 1.0,
    dropout: Option = 0.0,
    targets: Targets = FEED_FORWARD_OUTPUT,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""Put a bottleneck of several experts at modules of every layer. See `AdaMix`.

    Train it with the mean loss of one pass and `jpeft.consistency` of two, each with a key of its own. After training
    `jpeft.collapse` leaves a `Bottleneck`.

    **Arguments:**

    - `experts`: how many; a number, or a mapping from patterns of module paths to numbers, as are `width`, `scale` and
      `dropout`.
    - `width`: of the bottleneck.
    - `sharing_down`, `sharing_up`: whether that projection is one for all experts.
    - `distinct`: whether experts start apart, each drawn by itself. Otherwise they start as one, and it is the routing
      alone that tells them apart.
    - `init`, `activation`: as for `jpeft.bottleneck`. `"zero"` leaves the model as it was, `"bert"` is the authors'.
    - `dropout`: of the bottleneck's input, where `apply` is given a `"dropout"` key.
    - `targets`: paths of modules, by default the feed-forward's output projections, found by their usual names.
    - `sites`: needed for modules that own no two-dimensional kernel, or are stacked by `nn.scan`.
    - `key`: for the initialisation; `jax.random.key(0)` if left out.

    **Raises** `ValueError` for an unknown `init` or activation, a number of experts or a width below one, a dropout
    outside `[0, 1)`, where both projections are shared, and for targets as `attach` does.
    """
    activation_of(activation)
    one_of("init", init, STARTS)

    def new(key, features_in, features_out, *, experts, width, scale, dropout):
        if width < 1 or not 0 <= dropout < 1:
            raise ValueError(f"A bottleneck has a width of at least 1 and dropout in [0, 1), not {width=}, {dropout=}.")
        down, up = check_experts(experts, (sharing_down, sharing_up))
        counts = {"down": down, "down_bias": down, "up": up, "up_bias": up}
        each = jax.random.split(key, experts) if distinct else jnp.stack([key] * experts)
        drawn = jax.vmap(lambda key: arrays(key, init, features_out, width, features_out))(each)
        own = {name: x[: counts[name]] for name, x in drawn.items()}
        return AdaMix(**own, scale=scale, activation=activation, dropout=dropout)

    return attach(
        params, new, name="adamix", targets=targets, sites=sites, key=key,
        experts=experts, width=width, scale=scale, dropout=dropout,
    )  # fmt: skip


def consistency(first: jax.Array, second: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    r"""$\frac12 (KL(\bar p_2\,\|\,p_1) + KL(\bar p_1\,\|\,p_2))$ of the logits of two passes: how far they are apart.

    The mean over all examples, or tokens. $\bar p$ is a constant to gradients: each pass is drawn to the other.

    **Arguments:**

    - `first`, `second`: logits `(..., classes)` of two passes of one batch, with keys of their own.
    - `where`: `(...)`, which examples or tokens count; all by default.

    **Raises** `ValueError` for logits of different shapes, and for those of one class: their softmax is always 1, as in
    regression.
    """
    if first.shape != second.shape or first.shape[-1] < 2:
        raise ValueError(
            f"Logits of the shapes {first.shape} and {second.shape} are not those of two passes over two classes or "
            "more. Of a single output, as in regression, the softmax is 1: train without this loss."
        )
    first, second = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (first, second))
    return jnp.mean((_divergence(second, first) + _divergence(first, second)) / 2, where=where)


def _divergence(target: jax.Array, own: jax.Array) -> jax.Array:
    """KL(target || own) of log-probabilities, the target being a constant."""
    target = jax.lax.stop_gradient(target)
    return jnp.sum(jnp.exp(target) * (target - own), axis=-1)
