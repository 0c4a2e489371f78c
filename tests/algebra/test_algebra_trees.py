"""Which trees can be combined: models of every base, and every reason why some cannot."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tuned_trees import AXES, BASE, SHAPES, base, changes, loras, off, tuned, weighted

import jpeft
import jpeft.testing as laws
from jpeft import algebra
from jpeft._shared import SHARED


LORAS = loras()


def copied(params):
    return jax.tree.map(lambda x: jnp.array(x, copy=True), params)


@pytest.mark.slow
@pytest.mark.parametrize("kind, scan", laws.SUBJECTS)
def test_models(kind, scan):
    """A decoder with heads, and layers that are stacked or not: it computes as with the sum of changes in its base."""
    subject = laws.subject("decoder", base=kind, scan=scan)
    method = lambda rank: lambda on, targets: jpeft.lora(on, rank=rank, alpha=4, sites=subject.sites)
    a, b = (tuned(method(rank), rank, on=subject.params, targets=None, size=0.1) for rank in (2, 3))
    difference = lambda tree: jax.tree.map(lambda x, w: x - w, jpeft.merge(tree), jpeft.merge(subject.params))
    sums = jax.tree.map(lambda x, y: x - 0.5 * y, difference(a), difference(b))
    found = algebra.cat([a, b], weights=[1, -0.5])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), difference(found), sums)
    plain = jax.tree.map(lambda w, d: w + d, jpeft.merge(subject.params), sums)
    np.testing.assert_allclose(subject.run(found), subject.plain(plain), atol=1e-4)
    whole = algebra.svd([a, b], weights=[1, -0.5], rank=5)
    assert max(whole.errors.values()) < 1e-6
    jax.tree.map(np.testing.assert_array_equal, jpeft.strip(whole.params), subject.params)


def test_bases_of_the_same_bits():
    other = tuned(jpeft.lora, 2, on=copied(BASE), rank=3)
    assert off(changes(algebra.cat([LORAS[0], other])), weighted([LORAS[0], other], [1, 1])) < 3e-6


@pytest.mark.slow
def test_quantized_bases():
    """Their codes are compared; the sum is over what they stand for, and the codes stay."""
    quantized = [jpeft.nf4(params, targets=AXES, block=8) for params in (BASE, copied(BASE))]
    methods = zip((jpeft.lora, jpeft.dora), quantized, strict=True)
    trees = [tuned(method, n, on=on, rank=2) for n, (method, on) in enumerate(methods)]
    found = algebra.ties(trees, density=0.5, rank=2)
    node = found.params["layers"]["kernel"]
    assert isinstance(node, jpeft.LoRA) and isinstance(node.base, jpeft.NF4)
    assert off(changes(algebra.linear(trees)), weighted(trees, [1, 1])) < 3e-6
    with pytest.raises(ValueError, match=r"dense/kernel of trees\[1\]: its base is not that of trees\[0\]"):
        algebra.linear([trees[0], LORAS[0]])


def test_shared_arrays_stay_behind():
    trees = [tuned(jpeft.vera, n, rank=4) for n in (1, 2)]
    found = algebra.cat(trees)
    assert SHARED in trees[0] and SHARED not in found
    assert off(changes(found), weighted(trees, [1, 1])) < 3e-6


def test_half_precision():
    """Factors and changes are float32: nothing is rounded to the kernel's eight bits."""
    on = base(jnp.bfloat16)
    trees = [jax.tree.map(lambda x: x.astype(jnp.bfloat16), tuned(jpeft.lora, n, on=on, rank=2)) for n in (1, 2)]
    node = algebra.cat(trees, weights=[1, 0.3])["dense"]["kernel"]
    assert node.base.dtype == jnp.bfloat16 and node.b.dtype == jnp.float32
    np.testing.assert_array_equal(node.b[2:], jnp.float32(0.3) * trees[1]["dense"]["kernel"].b.astype(jnp.float32))
    assert algebra.ties(trees, density=0.5).params["conv"]["kernel"].values.dtype == jnp.float32


def test_boxes_stay():
    boxed = {"kernel": nn.Partitioned(jnp.ones((3, 6, 4)), names=("layer", None, "model"))}
    trees = [tuned(jpeft.lora, n, on=boxed, targets={"kernel": "sio"}, rank=2) for n in (1, 2)]
    node = algebra.svd(trees, rank=2).params["kernel"]
    assert node.base.value is boxed["kernel"].value and node.a.shape == (3, 6, 2)
    assert jpeft.merge(algebra.cat(trees))["kernel"].names == boxed["kernel"].names


def test_restored(tmp_path):
    jpeft.save(tmp_path / "sum", algebra.cat(LORAS))
    restored = jpeft.restore(tmp_path / "sum", BASE)
    jax.tree.map(np.testing.assert_array_equal, restored, algebra.cat(LORAS))


def refused(fn):
    with pytest.raises(ValueError) as e:
        fn()
    return str(e.value)


def test_all_that_is_no_change_of_weights_is_named():
    net = {name: {"kernel": jnp.ones((4, 4)), "bias": jnp.zeros(4)} for name in ("up", "down")}
    kernels = {"up/kernel": "io", "down/kernel": "io"}
    plain = jpeft.lora(net, targets=kernels)
    beside = jpeft.bottleneck(plain, targets="up", width=2)
    free = jpeft.unfreeze(plain, targets="down/bias")
    text = refused(lambda: algebra.linear([plain, beside, free]))
    assert "up/bottleneck of trees[1]: Bottleneck acts on activations" in text
    assert "down/bias of trees[2]: Free has taken the place of its base" in text and "`jpeft.delta`" in text
    assert len(text.splitlines()) == 3
    rows = jpeft.unfreeze({"layers": {"kernel": jnp.ones((3, 2, 2))}}, targets=".*", layers=[0])
    assert "layers/kernel of trees[0]: Rows has taken the place" in refused(lambda: algebra.linear([rows]))


def test_other_bases_and_other_models():
    kernel, bias = BASE["dense"].values()
    changed = BASE | {"dense": {"kernel": kernel.at[3, 4].add(1e-6), "bias": bias + 1}}
    text = refused(lambda: algebra.linear([LORAS[0], tuned(jpeft.lora, 1, on=changed)]))
    assert "dense/kernel of trees[1]: its base is not" in text and "dense/bias of trees[1]: its base" in text
    assert "conv" not in text
    fewer = {name: x for name, x in LORAS[1].items() if name != "conv"}
    assert "conv/kernel: trees[0] has no such parameter." in refused(lambda: algebra.linear([fewer, LORAS[0]]))


class Undecided(jpeft.Reparam):
    gate: jpeft.Trainable[jax.Array]

    def weight(self, w):
        raise ValueError("which of them? Say so.")


def test_a_node_without_a_value_says_why():
    tree = jpeft.wrap(BASE, lambda key, w: Undecided(gate=jnp.zeros(1)), targets="dense/kernel")
    assert "dense/kernel of trees[1]: which of them? Say so." in refused(lambda: algebra.linear([LORAS[0], tree]))


def test_letters():
    other = tuned(jpeft.delta, 1, targets=["heads/kernel"])
    text = refused(lambda: algebra.linear([LORAS[0], other]))
    assert "heads/kernel: its axes are ioo and ooo to its nodes" in text and "`sites`" in text


def test_cat_needs_factors():
    trees = [LORAS[0], tuned(jpeft.dora, 1, rank=2)]
    text = refused(lambda: algebra.cat(trees))
    assert all(f"{path} of trees[1]: DoRA has no factors" in text for path in SHAPES)
    assert "`svd`" in text and "trees[0]" not in text


def test_options():
    assert "There are 3 trees, and `weights` of the shape (2,)" in refused(lambda: algebra.cat(LORAS, weights=[1, 1]))
    assert "'dense/kernel': 0" in refused(lambda: algebra.svd(LORAS, rank=0))
    assert "These trees have no nodes" in refused(lambda: algebra.linear([BASE, BASE]))
    assert "a sequence of at least one" in refused(lambda: algebra.linear(LORAS[0]))
    assert "a sequence of at least one" in refused(lambda: algebra.linear([]))
