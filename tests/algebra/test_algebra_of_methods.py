"""Every method of the table takes part in sums, or is refused with the reason."""

import jax
import numpy as np
import pytest
from methods import METHODS

import jpeft
import jpeft.testing as laws
from jpeft import algebra


def kept_out(tree):
    """Whether something in a tree acts on activations, or trains in place of its base."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, jpeft.Node))
    beside = any(isinstance(x, jpeft.Additive) for x in nodes)
    shared = {id(x) for x in jax.tree.leaves(tree.get("jpeft_shared", {}), is_leaf=lambda x: isinstance(x, jpeft.Node))}
    lost = [x for x in nodes if isinstance(x, jpeft.Free | jpeft.Rows) and id(x) not in shared]
    return beside or bool(lost)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_twice_a_change_less_itself(method):
    subject = laws.subject(method.model, scan=True)
    start = method.make(subject.params, subject.sites, jax.random.key(3))
    trainable, frozen = jpeft.partition(start)
    tree = jpeft.combine(laws.shaken(trainable, jax.random.key(4)), frozen)
    twice = lambda: algebra.linear([tree, tree], weights=[2, -1])
    if kept_out(tree):
        with pytest.raises(ValueError, match=r"acts on activations|has taken the place of its base"):
            twice()
    else:
        found, wanted = jpeft.merge(twice()), jpeft.merge(tree)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5), found, wanted)
