"""Adam where entries of a parameter are replaced by others from time to time."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._node import widened


class AgedAdamState(NamedTuple):
    """Moments, and how many gradients each entry of them has seen."""

    age: Any  # int32, whatever the moments' dtype: bfloat16 cannot count past 256
    mu: Any
    nu: Any


def scale_by_aged_adam(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    dtype: Any = None,
) -> optax.GradientTransformation:
    r"""Adam that corrects the bias of its moments entry by entry, by the number $t_i$ of gradients that entry has seen:

    $$u_i = \frac{m_i / (1 - \beta_1^{t_i})}{\sqrt{v_i / (1 - \beta_2^{t_i})} + \epsilon}.$$

    Where nothing is replaced it is `optax.scale_by_adam`. What replaces an entry, such as `reselect`, sets its
    moments and its age to zero, and its next step is a first step: $t_i = 1$.

    **Arguments:**

    - `b1`, `b2`, `eps`: $\beta_1$, $\beta_2$ and $\epsilon$.
    - `dtype`: in which the moments are kept, by default the parameters' own. Everything is computed in float32 at
      least; ages are int32.

    Ansell et al., [Scaling Sparse Fine-Tuning to Large Language Models](https://arxiv.org/abs/2401.16405), 2024.
    """

    def init(params):
        zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, dtype or x.dtype), params)
        return AgedAdamState(age=jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.int32), params), mu=zeros(), nu=zeros())

    def update(updates, state, params=None):
        age = jax.tree.map(optax.safe_increment, state.age)
        mean = lambda decay, order: lambda g, m: decay * widened(m) + (1 - decay) * widened(g) ** order
        mu = jax.tree.map(mean(b1, 1), updates, state.mu)
        nu = jax.tree.map(mean(b2, 2), updates, state.nu)

        def step(g, t, m, v):
            t = t.astype(m.dtype)
            return (m / (1 - b1**t) / (jnp.sqrt(v / (1 - b2**t)) + eps)).astype(g.dtype)

        kept = lambda new, old: jax.tree.map(lambda x, like: x.astype(like.dtype), new, old)
        state = AgedAdamState(age=age, mu=kept(mu, state.mu), nu=kept(nu, state.nu))
        return jax.tree.map(step, updates, age, mu, nu), state

    return optax.GradientTransformation(init, update)
