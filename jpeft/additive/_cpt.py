"""CPT: a prompt of examples, whose embeddings may move a little."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from .._node import Frozen, Static, Trainable
from .._targets import TABLE, Targets
from .._tree import Params, nodes_of, transform
from ..models._loss import IGNORED, cross_entropy
from ._prompt import SoftPrompt, put_prompt


KINDS = 4  # of tokens in an example: the input's template, the input, the label's template, the label
INPUT, LABEL = 2, 0  # modulo `KINDS`


class CPT(SoftPrompt):
    r"""$P = E(c) + \delta$ with the tokens $c$ of examples, and $\lVert\delta_i\rVert \le \epsilon_i$.

    The embeddings of labels stay as they are: $\delta$ has rows for the other tokens alone.

    Blau et al., [Context-aware Prompt Tuning](https://arxiv.org/abs/2410.17222), 2024.
    """

    rows: Frozen[jax.Array]  # (length, features): E(c)
    delta: Trainable[jax.Array]  # (tokens that move, features)
    ids: Static[tuple[int, ...]]  # c
    types: Static[tuple[int, ...]]  # of every token, as `cpt` has them
    epsilon: Static[float]
    format_epsilon: Static[float]

    @property
    def moving(self) -> tuple[int, ...]:
        """The places of the tokens that move."""
        return tuple(n for n, kind in enumerate(self.types) if kind % KINDS != LABEL)

    def prompt(self, tasks):
        return self.rows.at[jnp.array(self.moving)].add(self.delta)

    def bounded(self) -> "CPT":
        r"""The node with $\delta_i\,\epsilon_i / \max(\lVert\delta_i\rVert, \epsilon_i)$ for every $\delta_i$."""
        kinds = (self.types[n] % KINDS for n in self.moving)
        bounds = np.array([[self.epsilon if kind == INPUT else self.format_epsilon] for kind in kinds], np.float32)
        bounds *= (self.delta.shape[1] / 2048) ** 0.5
        length = jnp.linalg.norm(self.delta.astype(jnp.float32), axis=1, keepdims=True)
        return self.replace(delta=self.delta * (bounds / jnp.maximum(length, bounds)).astype(self.delta.dtype))


@transform
def cpt(
    params: Params,
    *,
    ids: Sequence[int],
    types: Sequence[int],
    epsilon: float = 0.1,
    format_epsilon: float = 0.1,
    targets: Targets = TABLE,
    within: str = "",
    key: jax.Array | None = None,
) -> Params:
    r"""Put examples before every sequence, and let their embeddings move a little. See `CPT`.

    It starts as in-context learning with these examples. `optim.keep_bounded` keeps the embeddings near where they
    were, and `cpt_loss` is the loss of the labels of the examples, too.

    **Arguments:**

    - `ids`: the tokens of the examples.
    - `types`: what each of them is: of example $k$, from 0 on, `4k + 1` a part of the template around its input,
      `4k + 2` of the input, `4k + 3` of the template around its label, and `4k + 4` of the label. 0: a token which
      stays as it is.
    - `epsilon`: how far the embedding of an input's token may move, times $\sqrt{d / 2048}$ for $d$ features.
    - `format_epsilon`: how far that of a template's token may.
    - `targets`, `within`: as for `prompt`.
    - `key`: not used.

    **Raises** `ValueError` for types that are not one for each token, below 0, or all of labels, for bounds that are
    not above 0, and as `prompt` does.
    """
    ids, types = tuple(map(int, ids)), tuple(map(int, types))
    faults = []
    if len(ids) != len(types):
        faults.append(f"there are {len(ids)} `ids` and {len(types)} `types`: one for each token")
    if any(kind < 0 for kind in types) or all(kind % KINDS == LABEL for kind in types):
        faults.append(f"`types` is {types}: from 0 on, and some that are not divisible by {KINDS}, of tokens that move")
    if not (epsilon > 0 and format_epsilon > 0):
        faults.append(f"{epsilon=} and {format_epsilon=}: bounds above 0")
    if faults:
        raise ValueError("Of the examples nothing can be tuned: " + "; ".join(faults))

    def new(rows):
        moving = sum(kind % KINDS != LABEL for kind in types)
        own = {"rows": rows.astype(jnp.float32), "delta": jnp.zeros((moving, rows.shape[1])), "ids": ids}
        return CPT(**own, types=types, epsilon=float(epsilon), format_epsilon=float(format_epsilon))

    return put_prompt(params, new, length=len(ids), init=ids, targets=targets, within=within, key=key)


def cpt_loss(params: Params, logits: jax.Array, labels: jax.Array, *, decay: float = 1.0) -> jax.Array:
    r"""The mean cross-entropy of a text's labels and of those of the examples before it, which weigh less and less.

    With $K$ examples those of the text weigh 1, and those of example $k$, from 0 on, $\mathrm{decay}^{K - k}$. The sum
    of the weighted losses is divided by the number of labels.

    **Arguments:**

    - `params`: with a `CPT` node, whose examples have the labels that `types` tells.
    - `logits`: of a call with `keep_prompt=True`, `(batch, length + seq, vocab)`.
    - `labels`: of the text, `(batch, seq)`, -100 where there is nothing to predict. They are not shifted.
    - `decay`: from 0 to 1.

    **Raises** `ValueError` for logits without those of the examples, and if there is not one `CPT` node.
    """
    nodes = nodes_of(params, CPT, "cpt")
    total = sum(node.length for node in nodes.values()) + labels.shape[1]
    if len(nodes) != 1 or logits.shape[1] != total:
        raise ValueError(
            f"There are {list(nodes)} and {labels.shape[1]} labels, and logits of {logits.shape[1]} tokens: with one "
            f"`CPT` they must be of all {total}. Call the model with `keep_prompt=True`."
        )
    (node,) = nodes.values()
    is_label = np.array([kind > 0 and kind % KINDS == LABEL for kind in node.types])
    types = np.array(node.types)
    numbers = sorted(set(types[is_label].tolist()))
    age = np.array([len(numbers) - numbers.index(kind) if kind in numbers else 0 for kind in node.types])
    weights = np.concatenate([decay**age, np.ones(labels.shape[1])]).astype(np.float32)[1:]
    own = jnp.asarray(np.where(is_label, node.ids, IGNORED), labels.dtype)
    labels = jnp.concatenate([jnp.broadcast_to(own[None], (len(labels), len(own))), labels], axis=1)[:, 1:]
    losses = cross_entropy(logits[:, :-1].astype(jnp.float32), labels)
    return jnp.sum(losses * weights[None]) / jnp.sum(labels != IGNORED, dtype=jnp.float32)
