"""AdapterFusion: attention over adapters that have been trained one by one."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from .._checksum import same
from .._merge import beside
from .._node import Frozen, Static, Trainable, cast, is_param, widened
from .._operands import dropout as drop
from .._shared import SHARED, refs, resolve, unshare
from .._still import Still
from .._targets import Sites, name_of
from .._tree import Params, attach, modules, nodes_of, shared_arrays
from ._bottleneck import affine
from ._hidden import Hidden


class Fusion(Hidden):
    r"""$f(h) = \sum_i a_i\,z_i V$ with $a = \mathrm{softmax}_i((h Q + q) \cdot z_i K / T)$. See `Hidden`.

    $z_i = f_i(h)$ is what adapter $i$ adds, and does not train. $K$ has no bias: it would add the same to the scores of
    all adapters, to no effect.

    Pfeiffer et al., [AdapterFusion: Non-Destructive Task Composition for Transfer
    Learning](https://arxiv.org/abs/2005.00247), EACL 2021.
    """

    query: Trainable[jax.Array, "in width"]
    query_bias: Trainable[jax.Array, "width"]
    key: Trainable[jax.Array, "out width"]
    value: Trainable[jax.Array, "out width"]
    members: Frozen[tuple[Still, ...]] = ()
    temperature: Static[float] = 1.0

    def within(self, dtype):
        return cast(self.replace(members=()), dtype).replace(members=self.members)

    def change(self, h, key):
        terms = [member.node.within(h.dtype).change(h, None).astype(h.dtype) for member in self.members]
        z = jnp.stack(terms, axis=-2)  # (..., members, out)
        query = affine(h, self.query, self.query_bias) @ self.key.T
        scores = widened(jnp.einsum("...o,...no->...n", query, z)) / self.temperature
        a = jax.nn.softmax(drop(scores, self.dropout, key), axis=-1).astype(h.dtype)
        return jnp.einsum("...n,...no->...o", a, z) @ self.value


def fuse(
    trees: Sequence[Params],
    *,
    temperature: float = 1.0,
    dropout: float = 0.0,
    sites: Sites | None = None,
    key: jax.Array | None = None,
) -> Params:
    r"""One tree of several that were tuned on one base: attention over their adapters trains, and they do not.

    See `Fusion`. At every module that has an adapter in any of the trees, those that are there are fused. All that acts
    on hidden states can be: bottlenecks and their kin.

    **Arguments:**

    - `trees`: the members. They may differ in nothing but their adapters.
    - `temperature`: $T$.
    - `dropout`: of the scores, where `apply` is given a `"dropout"` key. Members have none.
    - `sites`: needed for modules that own no two-dimensional kernel, or are stacked by `nn.scan`.
    - `key`: for $Q$ and $K$, which are normal of deviation 0.02; `jax.random.key(0)` if left out. $V$ starts as the
      identity, with $10^{-6}$ beside the diagonal.

    **Raises** `ValueError`, with every path, for trees that differ in their bases or in other nodes, two adapters of a
    tree at one module, nodes around an adapter, and adapters of one module that are not at the same of its sides; for
    a temperature that is not above 0, a dropout outside `[0, 1)`, and for modules as `attach` does.
    """
    if not trees or temperature <= 0 or not 0 <= dropout < 1:
        raise ValueError(f"Fuse trees, at a temperature above 0, dropout in [0, 1), not {temperature=}, {dropout=}.")
    base, *others = map(_without, trees)
    faults = [fault for n, other in enumerate(others, 1) for fault in _differences(base, other, n)]
    at = defaultdict(list)
    for n, tree in enumerate(trees):
        nodes = _adapters(tree)
        for path, node in nodes:
            at[path].append(node)
        counts = Counter(path for path, _ in nodes)
        faults += [f"tree {n}: {path} has {count} adapters" for path, count in counts.items() if count > 1]
        outer = {path: beside(modules(tree)[path])[-1] for path in counts}
        around = [f"{path}/{name}" for path, (name, x) in outer.items() if not isinstance(x, Hidden)]
        faults += [f"tree {n}: {name} acts around an adapter" for name in around]
        faults += [] if nodes else [f"tree {n}: it has no adapter"]
    sides = {path: sorted({node.at for node in nodes}) for path, nodes in at.items()}
    faults += [f"{path}: adapters at its {' and '.join(s)}" for path, s in sides.items() if len(s) > 1]
    if faults:
        raise ValueError("These trees cannot be fused:\n  " + "\n  ".join(faults))

    def new(key, features_in, features_out, *, side):
        features_in = features_in if side == "input" else features_out
        query, other = jax.random.split(key)
        return Fusion(
            query=0.02 * jax.random.normal(query, (features_in, features_out)),
            query_bias=jnp.zeros(features_out),
            key=0.02 * jax.random.normal(other, (features_out, features_out)),
            value=jnp.fill_diagonal(1e-6 * jnp.ones((features_out, features_out)), 1.0, inplace=False),
            temperature=temperature,
            at=side,
            dropout=dropout,
        )

    side = {re.escape(path): s for path, (s,) in sides.items()}
    params = attach(base, new, name="fusion", targets=lambda path, _: path in at, sites=sites, key=key, side=side)
    filled = lambda path, x: x.replace(members=tuple(map(Still.of, at[_module(name_of(path))])))
    return jax.tree_util.tree_map_with_path(
        lambda path, x: filled(path, x) if isinstance(x, Fusion) else x, params, is_leaf=is_param
    )


def fusion_penalty(params: Params, *, weight: float = 0.01) -> jax.Array:
    r"""$\lambda \sum \lVert V - I \rVert_F^2$ over the `Fusion` nodes of a tree, where `weight` is $\lambda$.

    It is added to the loss. Take it of the whole tree, within the loss.

    **Raises** `ValueError` if there is no `Fusion` node in the tree.
    """
    values = [widened(node.value) for node in nodes_of(params, Fusion, "fuse").values()]
    return weight * sum(jnp.sum((v - jnp.broadcast_to(jnp.eye(v.shape[-1]), v.shape)) ** 2) for v in values)


def _module(name: str) -> str:
    return name.rpartition("/")[0]


def _adapters(tree: Params) -> list[tuple[str, Hidden]]:
    """The adapters, each with the path of its module, and with the arrays that they share as their own."""
    nodes, shared = nodes_of(tree, Hidden, nested=False), shared_arrays(tree)
    return [(_module(name), unshare(resolve(node, shared))) for name, node in nodes.items()]


def _without(tree: Params) -> Params:
    """The tree without its adapters, and what they alone share."""

    def kept(x):
        return {k: kept(y) for k, y in x.items() if not isinstance(y, Hidden)} if isinstance(x, Mapping) else x

    rest = kept({k: x for k, x in tree.items() if k != SHARED})
    shared = {name: x for name, x in tree.get(SHARED, {}).items() if name in refs(rest)}
    return rest | ({SHARED: shared} if shared else {})


def _differences(base: Params, other: Params, n: int) -> list[str]:
    """What is not the same in the tree of number `n` as in the first."""
    named = lambda tree: {name_of(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_param)}
    ours, theirs = named(base), named(other)
    return [
        f"tree {n}: {name} is not that of tree 0"
        for name in ours | theirs
        if name not in ours or name not in theirs or not same(ours[name], theirs[name])
    ]
