"""The laws that every method keeps, as functions that a method's author can call.

    import jpeft.testing as laws

    method = laws.Method("mine", lambda params, sites, key: mine(params, rank=2, sites=sites, key=key))
    laws.check(method)                                       # every law, on float and quantized bases, scanned too
    laws.identity(method, laws.subject("decoder"))           # one law, on one subject

A law raises `AssertionError` with what it found. A method that cannot keep one, or cannot stand on a base, declares it
with the reason in `Method.exceptions`.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._apply import apply, coverage, sites
from ._checkpoint import restore, save
from ._kernel import fold
from ._node import Additive, Amplified, Branch, Leaf, cast, is_node, value
from ._shared import resolve
from ._targets import Sites
from ._tree import Params, combine, labels, merge, partition, shared_arrays, strip
from .models import Decoder, DecoderConfig, Encoder, EncoderConfig
from .quantized._int8 import int8
from .quantized._nf4 import nf4


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """A method under test."""

    name: str
    make: Callable[[Params, Sites, jax.Array], Params]  # from a tree, its sites and a key
    count: Callable[[Params, Sites], int] | None = None  # the formula for its number of trainable parameters
    model: Literal["decoder", "encoder"] = "decoder"
    exceptions: Mapping[str, str] = dataclasses.field(default_factory=dict)  # law or base -> why it cannot be


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A model, its parameters, and what it is called with."""

    model: nn.Module
    params: Params
    args: tuple[Any, ...]
    scan: bool
    base: Literal["float", "int8", "nf4"]

    @functools.cached_property
    def sites(self) -> Sites:
        return sites(self.model, {"params": merge(self.params)}, *self.args)

    def __call__(self, params: Params) -> jax.Array:
        """The model's output with `params`, nodes at work."""
        return apply(self.model, {"params": params}, *self.args)

    def loss(self, params: Params) -> jax.Array:
        """A loss with `params`: how far the output is from waves."""
        y = self(params).astype(jnp.float32)
        return jnp.mean(jnp.square(y - jnp.cos(jnp.arange(y.size)).reshape(y.shape)))

    @functools.cached_property
    def run(self) -> Callable[[Params], jax.Array]:
        """The subject, compiled: once for every structure, whichever laws call it."""
        return jax.jit(self.__call__)

    @functools.cached_property
    def plain(self) -> Callable[[Params], jax.Array]:
        """The model's own `apply`, compiled."""
        return jax.jit(lambda params: self.model.apply({"params": params}, *self.args))

    @functools.cached_property
    def slope(self) -> Callable[[Params, Params], tuple[jax.Array, Params]]:
        """The loss and its gradient, of the trainable and the frozen tree, compiled."""
        return jax.jit(jax.value_and_grad(lambda trainable, frozen: self.loss(combine(trainable, frozen))))

    @functools.cached_property
    def output(self) -> jax.Array:
        """The output of the base alone."""
        return self.run(self.params)


BASES = {
    "float": lambda params, sites: params,
    "int8": lambda params, sites: int8(params, sites=sites),
    "nf4": lambda params, sites: nf4(params, sites=sites),
}
SUBJECTS = (("float", False), ("float", True), ("int8", False), ("nf4", True))  # base, and whether layers are scanned
LAYERS = 2


@functools.cache
def subject(model: str = "decoder", scan: bool = False, base: str = "float") -> Subject:
    """A small model with random parameters, none of them zero: Llama-like, or BERT's encoder."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": LAYERS}
    if model == "decoder":
        net = Decoder(DecoderConfig(**sizes, num_attention_heads=4, num_key_value_heads=2), scan=scan)
    else:
        net = Encoder(EncoderConfig(**sizes, num_attention_heads=4, max_position_embeddings=12), scan=scan)
    ids = jax.random.randint(jax.random.key(1), (2, 6), 0, 32)
    mask = jnp.ones((2, 6), jnp.int32).at[1, 4:].set(0)
    params = shaken(jax.jit(net.init)(jax.random.key(0), ids)["params"], jax.random.key(2))
    plain = Subject(net, params, (ids, mask), scan, "float")
    return plain if base == "float" else dataclasses.replace(plain, params=BASES[base](params, plain.sites), base=base)


def shaken(tree: Any, key: jax.Array, size: float = 0.1) -> Any:
    """The tree with noise added to every array, so that nothing is zero, or equal by its start alone."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    noise = [size * jax.random.normal(k, x.shape).astype(x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return treedef.unflatten([x + n for x, n in zip(leaves, noise, strict=True)])


@functools.cache
def _tuned(method: Method, subject: Subject) -> tuple[Params, Params]:
    """The tree as the method makes it, and as it may be after training."""
    start = method.make(subject.params, subject.sites, jax.random.key(3))
    trainable, frozen = partition(start)
    return start, combine(shaken(trainable, jax.random.key(4)), frozen)


def _close(found: Any, expected: Any, what: str, tolerance: float = 1e-4) -> None:
    """Equal to rounding: within `tolerance` of the largest expected entry."""
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(np.abs(y).max(initial=0), 1e-3), err_msg=what)


def identity(method: Method, subject: Subject) -> None:
    """At the start the model is what it was."""
    start, _ = _tuned(method, subject)
    _close(subject.run(start), subject.output, "the method changes the model at the start")


def acts(method: Method, subject: Subject) -> None:
    """Once trained the model is another, and every node has a part in it."""
    _, tuned = _tuned(method, subject)
    assert not np.allclose(subject.run(tuned), subject.output, atol=1e-3), "the method changes nothing"
    ways = coverage(subject.model, {"params": tuned}, *subject.args)
    assert set(ways.values()) <= {"branched", "merged"}, str(ways)


def branches(method: Method, subject: Subject) -> None:
    """`branch(x) == x @ (weight(w) - w)` for random `x` and `w`, and it is linear in `x`.

    Of an `Amplified` node it is `x @ (weight(w) / gain(w) - w)`.
    """
    _, tuned = _tuned(method, subject)
    tuned = resolve(tuned, shared_arrays(tuned))
    for node in (x for x in jax.tree.leaves(tuned, is_leaf=is_node) if isinstance(x, Branch | Amplified)):
        w = jax.random.normal(jax.random.key(5), fold(value(node.base), node.axes).shape)
        x = jax.random.normal(jax.random.key(6), (*w.shape[:-2], 5, w.shape[-2]))
        alone = node.replace(base=None)
        y = alone.each(lambda n, x: n.branch(x, None), x)
        made = alone.each(lambda n, w: n.weight(w), w)
        if isinstance(node, Amplified):
            made = made / alone.each(lambda n, w: n.gain(w), w)[..., None, :]
        change = made - w
        _close(y, jnp.einsum("...ni,...io->...no", x, change), "branch is not weight")
        _close(alone.each(lambda n, x: n.branch(2 * x, None), x), 2 * y, "branch is not linear")


def merges(method: Method, subject: Subject) -> None:
    """`apply` is the plain model with merged parameters."""
    _, tuned = _tuned(method, subject)
    plain = merge(tuned)
    chex.assert_trees_all_equal_shapes_and_dtypes(plain, merge(subject.params))
    _close(subject.plain(plain), subject.run(tuned), "merged parameters give another output")


def unboxes(method: Method, subject: Subject) -> None:
    """`apply` is the plain model that knows nothing of nodes and unboxes them."""
    _, tuned = _tuned(method, subject)
    _close(subject.plain(tuned), subject.run(tuned), "unboxed nodes give another output")


def partitions(method: Method, subject: Subject) -> None:
    """`combine(*partition(params))` is `params`; the two have no array in common, and `labels` tells which is whose."""
    start, _ = _tuned(method, subject)
    trainable, frozen = partition(start)
    chex.assert_trees_all_equal(combine(trainable, frozen), start)
    marks = jax.tree.leaves(labels(start))
    assert len(jax.tree.leaves(trainable)) == marks.count("trainable") > 0
    assert len(jax.tree.leaves(frozen)) == marks.count("frozen")


def trains(method: Method, subject: Subject) -> None:
    """Gradients are those of finite differences, and none is zero once the method has left its start."""
    _, tuned = _tuned(method, subject)
    trainable, frozen = partition(tuned)
    _, grads = subject.slope(trainable, frozen)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, trainable)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.abs(g).max() > 0, f"the gradient of {jax.tree_util.keystr(path)} is zero"
    size = optax.tree.norm(grads)
    along = jax.tree.map(lambda g: g / size, grads)
    at = lambda t: subject.slope(jax.tree.map(lambda x, d: x + t * d, trainable, along), frozen)[0]
    step = 3e-3
    _close((at(step) - at(-step)) / (2 * step), size, "the gradient is not the slope of the loss", 2e-2)


def freezes(method: Method, subject: Subject) -> None:
    """Steps of AdamW with weight decay leave every frozen array bitwise as it was, and change every trainable one."""
    _, tuned = _tuned(method, subject)
    trainable, frozen = partition(tuned)
    tx = optax.adamw(1e-2, weight_decay=0.1)
    state = tx.init(trainable)
    assert sum(x.size for x in jax.tree.leaves(state)) == 1 + 2 * sum(x.size for x in jax.tree.leaves(trainable))

    for _ in range(3):
        _, grads = subject.slope(trainable, frozen)
        with jax.numpy_dtype_promotion("standard"):  # Optax counts steps in integers
            updates, state = tx.update(grads, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    after = partition(combine(trainable, frozen))
    chex.assert_trees_all_equal(after[1], partition(tuned)[1])
    for x, y in zip(jax.tree.leaves(after[0]), jax.tree.leaves(partition(tuned)[0]), strict=True):
        assert (x != y).any(), "a trainable array has not moved"


def counts(method: Method, subject: Subject) -> None:
    """The number of trainable parameters is that of the method's formula."""
    if method.count is None:
        raise AssertionError("the method has no formula: give `Method.count`")
    trainable, _ = partition(_tuned(method, subject)[0])
    found = sum(x.size for x in jax.tree.leaves(trainable))
    expected = method.count(merge(subject.params), subject.sites)
    assert found == expected, f"{found} trainable parameters, {expected} by the formula"


def scans(method: Method, subject: Subject) -> None:
    """Layers scanned over are layers one by one."""
    if not subject.scan:  # it is a law of scanned models
        return
    _, tuned = _tuned(method, subject)
    plain = dataclasses.replace(subject.model, scan=False, parent=None)
    layers = [jax.tree.map(lambda x, n=n: x[n], subject.params["layers"]) for n in range(LAYERS)]
    rest = lambda params: {k: x for k, x in params.items() if k != "layers"}
    base = rest(subject.params) | {f"layers_{n}": _flat(layer) for n, layer in enumerate(layers)}
    other = dataclasses.replace(subject, model=plain, params=base, scan=False)
    made = method.make(base, other.sites, jax.random.key(3))
    values = [jax.tree.leaves(jax.tree.map(lambda x, n=n: x[n], tuned["layers"])) for n in range(LAYERS)]
    for n in range(LAYERS):
        made[f"layers_{n}"] = jax.tree.unflatten(jax.tree.structure(made[f"layers_{n}"]), values[n])
    made |= {k: jax.tree.unflatten(jax.tree.structure(made[k]), jax.tree.leaves(x)) for k, x in rest(tuned).items()}
    _close(subject.run(tuned), other.run(made), "scanned layers are not unrolled ones")


def _flat(layer: Params) -> Params:
    """A layer whose nodes are of one kernel, after a stack of them has been sliced."""
    lone = lambda x: x.replace(axes=x.axes.replace("s", "")) if hasattr(x, "axes") else x
    return jax.tree.map(lone, layer, is_leaf=lambda x: isinstance(x, Leaf))



def maps(method: Method, subject: Subject) -> None:
    """`vmap` over the trainable trees of several adapters is a loop over them."""
    _, tuned = _tuned(method, subject)
    trainable, frozen = partition(tuned)
    several = [trainable, shaken(trainable, jax.random.key(7))]
    run = lambda t: subject(combine(t, frozen))
    ys = jax.jit(jax.vmap(run))(jax.tree.map(lambda *xs: jnp.stack(xs), *several))
    _close(ys, jnp.stack([subject.run(combine(t, frozen)) for t in several]), "vmap over adapters is no loop over them")


def compiles(method: Method, subject: Subject) -> None:
    """Compiled is eager, and other values in the same shapes are no new trace."""
    start, tuned = _tuned(method, subject)
    traces = 0

    def run(params):
        nonlocal traces
        traces += 1
        return subject(params)

    compiled = jax.jit(run)
    compiled(start)
    _close(compiled(tuned), subject(tuned), "compiled is not eager")
    assert traces == 1, f"{traces} traces for one structure"


def keeps_dtypes(method: Method, subject: Subject) -> None:
    """A bfloat16 model stays one: its output, its merged parameters, and every gradient its own leaf's."""
    if subject.base != "float":  # codes have no dtype to keep
        return
    half = dataclasses.replace(subject, params=cast(subject.params, jnp.bfloat16))
    _, tuned = _tuned(method, half)
    y = jax.eval_shape(half.__call__, tuned)
    assert y.dtype == jax.eval_shape(half.__call__, half.params).dtype, f"the output is {y.dtype}"
    if not any(isinstance(x, Additive) for x in jax.tree.leaves(tuned, is_leaf=is_node)):
        chex.assert_trees_all_equal_dtypes(merge(tuned), half.params)
    trainable, frozen = partition(tuned)
    grads = jax.eval_shape(jax.grad(lambda t: half.loss(combine(t, frozen))), trainable)
    chex.assert_trees_all_equal_dtypes(grads, trainable)


def saves(method: Method, subject: Subject) -> None:
    """What is saved and restored on its base is bitwise what it was, and so is the output."""
    _, tuned = _tuned(method, subject)
    with tempfile.TemporaryDirectory() as folder:
        save(path := Path(folder) / "adapter", tuned)
        back = restore(path, subject.params)
    chex.assert_trees_all_equal(back, tuned)
    chex.assert_trees_all_equal_dtypes(back, tuned)


def strips(method: Method, subject: Subject) -> None:
    """`strip` gives the base's structure back; where no base's array trains, also its arrays."""
    start, _ = _tuned(method, subject)
    chex.assert_trees_all_equal_shapes_and_dtypes(strip(start), subject.params)
    chex.assert_trees_all_equal(strip(start), subject.params)


LAWS: dict[str, Callable[[Method, Subject], None]] = {
    law.__name__: law
    for law in (
        identity, acts, branches, merges, unboxes, partitions, trains, freezes, counts, scans, maps, compiles,
        keeps_dtypes, saves, strips,
    )
}  # fmt: skip


def cases(method: Method) -> Iterator[tuple[str, str, bool]]:
    """The law, the base and whether layers are scanned, of every case that the method does not except.

    **Raises** `ValueError` for an exception to no law and no base.
    """
    unknown = set(method.exceptions) - set(LAWS) - set(BASES)
    if unknown:
        known = ", ".join((*LAWS, *BASES))
        raise ValueError(f"There are no laws or bases {sorted(unknown)} to except; there are {known}.")
    every = ((law, base, scan) for law in LAWS for base, scan in SUBJECTS)
    return (case for case in every if method.exceptions.keys().isdisjoint(case[:2]))


def check(method: Method) -> None:
    """Every law on `SUBJECTS`, but for the method's exceptions.

    **Raises** `AssertionError` at the first law that does not hold, and `ValueError` for an exception to no law.
    """
    for law, base, scan in cases(method):
        LAWS[law](method, subject(method.model, scan, base))
