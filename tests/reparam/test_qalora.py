"""QA-LoRA: as the LoRA that it is, and folded into zero points without a change of any code."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

import jpeft
from jpeft.testing import shaken


def close(found, want, tolerance=1e-5):
    np.testing.assert_allclose(found, want, rtol=0, atol=tolerance * np.abs(want).max())


def trained(params):
    trainable, frozen = jpeft.partition(params)
    return jpeft.combine(shaken(trainable, jax.random.key(7), 0.3), frozen)


@pytest.mark.parametrize("group", [1, 4, 5, 12])
def test_lora_of_repeated_rows(group):
    """Also where groups do not divide the inputs, and the last one is shorter."""
    node = trained(jpeft.qalora({"kernel": normal(0, 12, 8)}, rank=3, alpha=6, group=group))["kernel"]
    assert node.a.shape == (-(-12 // group), 3)
    a = np.repeat(node.a, group, axis=0)[:12]
    lora = jpeft.LoRA(base=node.base, a=jnp.asarray(a), b=node.b, scale=2.0)
    x = normal(1, 2, 5, 12)
    close(node.value(), lora.value())
    close(node.branch(x, None), lora.branch(x, None))


def test_pooling():
    """PEFT multiplies means of groups by the number of groups: sums, times groups over group."""
    params = {"kernel": normal(0, 12, 8)}
    scale = lambda **options: jpeft.qalora(params, group=4, rank=2, **options)["kernel"].scale
    assert (scale(), scale(alpha=8), scale(alpha=8, pooling="peft")) == (1.0, 4.0, 3.0)


def test_start():
    node = jpeft.qalora({"kernel": normal(0, 64, 8)}, rank=4, group=4)["kernel"]
    np.testing.assert_array_equal(node.value(), node.base)
    assert 0.2 < jnp.abs(node.a).max() <= 16**-0.5


KERNELS = {
    "dense": ((24, 10), "io"),
    "shorter last group": ((20, 10), "io"),
    "several axes": ((24, 2, 5), "ioo"),
    "stacked": ((3, 24, 10), "sio"),
    "stacked in the middle": ((24, 3, 2, 5), "isoo"),
}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
def test_into_zeros(kernel, symmetric):
    """What is merged is what was applied, the codes are bitwise those of the base, and so are the constants."""
    shape, axes = KERNELS[kernel]
    targets = {"kernel": axes}
    base = jpeft.int4({"kernel": normal(0, *shape)}, group=8, symmetric=symmetric, targets=targets)
    tuned = trained(jpeft.qalora(base, rank=3, alpha=6, group=8, targets=targets))
    merged = jpeft.merge_into_zeros(tuned)["kernel"]
    assert isinstance(merged, jpeft.Int4) and merged.zero.dtype == jnp.float32
    np.testing.assert_array_equal(merged.codes, base["kernel"].codes)
    np.testing.assert_array_equal(merged.scale, base["kernel"].scale)
    assert merged.codes.dtype == jnp.uint8
    close(merged.value(), tuned["kernel"].value())
    assert np.abs(merged.value() - base["kernel"].value()).max() > 0.1


def test_a_group_of_zeros():
    """Its constant is zero, and so would be whatever a zero point is multiplied with."""
    w = normal(0, 16, 4).at[8:, 1].set(0.0)
    tuned = trained(jpeft.qalora(jpeft.int4({"kernel": w}, group=8), rank=2, group=8))
    close(jpeft.merge_into_zeros(tuned)["kernel"].value(), tuned["kernel"].value())


def test_once_more():
    """What was merged is a base like others."""
    base = jpeft.int4({"kernel": normal(0, 16, 4)}, group=8, symmetric=False)
    for _ in range(2):
        tuned = trained(jpeft.qalora(base, rank=2, group=8))
        base = jpeft.merge_into_zeros(tuned)
    close(base["kernel"].value(), tuned["kernel"].value())
    x = normal(1, 3, 16)
    close(jpeft.apply(lambda params, x: x @ params["kernel"], base, x), x @ tuned["kernel"].value())


def test_bits():
    params = jpeft.int4({"kernel": normal(0, 256, 256)}, symmetric=False)
    merged = jpeft.merge_into_zeros(jpeft.qalora(params, rank=2))
    bits = lambda tree: 8 * jpeft.summary(tree).weight_bytes / 256**2
    assert (bits(params), bits(merged)) == (4 + 40 / 64, 4 + 64 / 64)


def test_refuses():
    w = normal(0, 16, 4)
    with pytest.raises(ValueError, match="'mean': one of sum, peft"):
        jpeft.qalora({"kernel": w}, pooling="mean")
    with pytest.raises(ValueError, match="at least one input, not 0"):
        jpeft.qalora({"kernel": w}, group=0)
    tree = {"a": jpeft.int4({"kernel": w}, group=4), "b": {"kernel": w}, "c": jpeft.int4({"kernel": w}, group=8)}
    faults = "  a/kernel: its group is 8, its base's 4\n  b/kernel: its base is ArrayImpl"
    with pytest.raises(ValueError, match=re.escape(faults)):
        jpeft.merge_into_zeros(jpeft.qalora(tree, group=8))
    with pytest.raises(ValueError, match="no QALoRA node"):
        jpeft.merge_into_zeros(jpeft.lora(tree))
