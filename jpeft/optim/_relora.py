"""ReLoRA: high rank out of one low rank after another."""

import jax
import jax.numpy as jnp
import optax

from .._kernel import stacked
from .._node import Leaf, rebox, value
from .._tree import Params, map_nodes, nodes_of
from ..reparam._factors import uniform
from ..reparam._lora import LoRA


def relora_restart(
    params: Params, opt_state: optax.OptState, *, key: jax.Array, prune: float = 1.0
) -> tuple[Params, optax.OptState]:
    r"""Take every LoRA's term into its base, and start the term anew: $W \leftarrow W + s A B$, $A \sim U$, $B = 0$.

    $W'$ is what it was, up to the rounding to the dtype of $W$: in bfloat16 a term that is small beside $W$ is lost,
    so keep $W$ in float32. From term to term the change gains rank. A restart can be compiled, and no shape changes.

    The base is another one then. `jpeft.save` keeps what trains, and `jpeft.restore` refuses the base as it was at
    first: keep `jpeft.strip(params)` as well, and restore over that.

    **Arguments:**

    - `params`, `opt_state`: the tree, and the state of an optimizer for what trains in it.
    - `key`: for $A \sim U(\pm 1/\sqrt{in})$.
    - `prune`: which part of each moment of $A$ and $B$ becomes zero, in every matrix of a stack the smallest entries
      first. 1 is a reset; the authors also have 0.9 to 0.99. Counts of steps, and the moments of all else, stay.

    **Raises** `ValueError` for a tree without LoRA, for a LoRA over another node, such as a quantized kernel: the sum
    would have to be rounded to codes; and for a `prune` outside `[0, 1]`.

    Lialin et al., [ReLoRA: High-Rank Training Through Low-Rank Updates](https://arxiv.org/abs/2307.05695), ICLR 2024.
    """
    if not 0 <= prune <= 1:
        raise ValueError(f"`prune` is {prune}: a part of the entries, from 0 to 1.")
    found = nodes_of(params, LoRA, "lora")
    if stuck := [f"  {name}: {type(x.base).__name__}" for name, x in found.items() if isinstance(x.base, Leaf)]:
        raise ValueError(
            "These bases cannot take in a term of low rank:\n" + "\n".join(stuck) + "\n"
            "Have LoRA directly on kernels that are arrays of floating-point numbers."
        )
    keys = iter(jax.random.split(key, len(found)))

    def restarted(node):
        a = uniform(next(keys), node.a.shape, node.a.shape[-2]).astype(node.a.dtype)
        return node.replace(base=rebox(node.base, value(node)), a=a, b=jnp.zeros_like(node.b))

    forgotten = lambda node: jax.tree.map(stacked(lambda x: _pruned(x, prune), node.depth), node)
    return map_nodes(restarted, params, LoRA), map_nodes(forgotten, opt_state, LoRA)


def _pruned(x: jax.Array, part: float) -> jax.Array:
    """Without that part of the entries that is the smallest."""
    order = jnp.argsort(jnp.abs(x).ravel())
    return x.ravel().at[order[: round(part * x.size)]].set(0).reshape(x.shape)


def relora_schedule(
    peak_value: float,
    *,
    total_steps: int,
    restart_every: int,
    warmup_steps: int = 0,
    restart_warmup_steps: int = 100,
    end_value: float | None = None,
) -> optax.Schedule:
    """A cosine decay over all steps that rises from zero after every restart.

    **Arguments:**

    - `peak_value`, `warmup_steps`: where the first rise ends, and after how many steps.
    - `total_steps`, `end_value`: where the decay ends; by default at a tenth of the peak.
    - `restart_every`, `restart_warmup_steps`: the steps from one restart to the next, of which the first ones are a
      rise to the decay's value where they end. `relora_restart` belongs before the steps `restart_every`, twice that,
      and so on.

    **Raises** `ValueError` for a rise that is not over when the next begins.
    """
    if not (0 <= restart_warmup_steps < restart_every and 0 <= warmup_steps < min(restart_every, total_steps)):
        given = f"{warmup_steps=}, {restart_warmup_steps=}, {restart_every=}, {total_steps=}"
        raise ValueError(f"A warmup must be over when the next begins: {given}.")
    end_value = 0.1 * peak_value if end_value is None else end_value
    decay = optax.warmup_cosine_decay_schedule(0.0, peak_value, warmup_steps, total_steps, end_value)

    def schedule(step):
        since = step % restart_every
        rise = since / max(restart_warmup_steps, 1) * decay(step - since + restart_warmup_steps)
        return jnp.where((step >= restart_every) & (since < restart_warmup_steps), rise, decay(step))

    return schedule
