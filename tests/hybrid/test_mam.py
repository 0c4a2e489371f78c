"""MAM is a prefix and a parallel adapter: without one of them it is the other."""

import jax
import numpy as np
import pytest

import jpeft
from jpeft.testing import shaken, subject


def drop(params, kind):
    """The tree without nodes of a class."""
    is_one = lambda x: isinstance(x, kind)
    walk = lambda tree: {k: walk(x) if isinstance(x, dict) else x for k, x in tree.items() if not is_one(x)}
    return walk(params)


def made(model, **options):
    tuned = jpeft.mam(model.params, length=3, width=4, sites=model.sites, **options)
    trainable, frozen = jpeft.partition(tuned)
    return jpeft.combine(shaken(trainable, jax.random.key(1)), frozen)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_each_part_alone(kind):
    model = subject(kind)
    tuned = made(model, prefix_width=None)
    front = jpeft.prefix(model.params, length=3, sites=model.sites)
    beside = jpeft.bottleneck(model.params, placement="parallel", width=4, sites=model.sites)

    def like(tree):
        """`tree` with the arrays that `tuned` has of the same names."""
        own = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(tuned)}
        return jax.tree_util.tree_map_with_path(lambda p, _: own[jax.tree_util.keystr(p)], tree)

    shifts = ((jpeft.Prefix, like(beside)), (jpeft.Bottleneck, like(front)))
    for left_out, alone in shifts:
        without = drop(tuned, left_out)
        without = drop(without, jpeft.Shift) if left_out is jpeft.Prefix else without
        np.testing.assert_allclose(model.run(without), model.run(alone), rtol=0, atol=1e-5)
        assert np.abs(model.run(without) - model.run(tuned)).max() > 1e-2


def test_sizes_of_the_paper():
    model = subject("decoder")
    tuned = jax.eval_shape(lambda p: jpeft.mam(p, sites=model.sites), model.params)
    adapters = [x for x in jax.tree.leaves(tuned, is_leaf=lambda x: isinstance(x, jpeft.Bottleneck))
                if isinstance(x, jpeft.Bottleneck)]  # fmt: skip
    assert {(x.down.shape, x.scale, x.activation, x.at) for x in adapters} == {((16, 512), 4.0, "relu", "input")}
    assert tuned["jpeft_shared"]["prefix_rows"].array.shape[0] == 30
    assert tuned["jpeft_shared"]["prefix_down"].array.shape[1] == 800


def test_the_network_is_dropped():
    model = subject("decoder")
    tuned = made(model, prefix_width=5)
    plain = jpeft.collapse(tuned)
    assert isinstance(plain["layers_0"]["attention"]["kv"]["prefix"], jpeft.Prefix)
    np.testing.assert_allclose(model.run(plain), model.run(tuned), rtol=0, atol=1e-5)
