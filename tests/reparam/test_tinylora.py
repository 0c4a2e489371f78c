"""What is known of TinyLoRA in closed form: it is LoRA-XS of few numbers, which kernels can share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

import jpeft


WEIGHTS = {"up": normal(0, 6, 9), "down": normal(1, 9, 4)}
X = normal(2, 5, 6)


def model(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def loss(trainable, frozen):
    return jnp.sum(jpeft.apply(model, jpeft.combine(trainable, frozen), X) ** 2)


def tiny(**options):
    return jpeft.tinylora(WEIGHTS, targets=".*", **{"rank": 2, "length": 5, **options})


def test_is_lora_xs_where_the_projections_are_a_basis():
    """But for the singular values: each factor has their roots, and in LoRA-XS A has all of them."""
    node, xs = tiny(length=4)["up"], jpeft.lora_xs(WEIGHTS, rank=2, targets="up")["up"]
    v = normal(3, 4)
    node = node.replace(p=jnp.eye(4).reshape(4, 2, 2), v=v)
    root = jnp.sqrt(jnp.linalg.svd(WEIGHTS["up"], compute_uv=False)[:2])
    r = v.reshape(2, 2) / root[:, None] * root[None]
    np.testing.assert_allclose(node.value(), xs.replace(r=r).value(), atol=1e-4)
    assert np.abs(node.value() - WEIGHTS["up"]).max() > 0.1


def test_start():
    """v = 0 has a gradient; projections are normal, of a variance of 1 / r."""
    params = tiny()
    np.testing.assert_array_equal(jpeft.merge(params)["up"], WEIGHTS["up"])
    assert np.all(jax.grad(loss)(*jpeft.partition(params))["up"].v != 0)
    p = tiny(rank=4, length=2000)["down"].p
    np.testing.assert_allclose([np.mean(p), np.std(p)], [0, 0.5], atol=0.02)


def test_a_shared_vector_is_one_leaf_and_sums_gradients():
    own, shared = tiny(), tiny(group="one")
    trainable, frozen = jpeft.partition(shared)
    assert [x.shape for x in jax.tree.leaves(trainable)] == [(5,)]
    want = jax.grad(loss)(*jpeft.partition(own))
    found = jax.grad(loss)(trainable, frozen)["jpeft_shared"]["tinylora_one"].array
    np.testing.assert_allclose(found, want["up"].v + want["down"].v, rtol=1e-4, atol=1e-5)
    assert np.all(want["up"].v != 0) and np.all(want["down"].v != 0)


def test_groups_by_pattern():
    params = jpeft.tinylora(
        {"a": normal(3, 3, 6, 9), "b": normal(4, 6, 9), "c": normal(5, 9, 4)},
        length=5,
        group={"[ab]": "one", ".*": None},
        targets={"a": "sio", ".*": "io"},
    )
    sizes = {jax.tree_util.keystr(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(params)}
    assert [path for path in sizes if path.endswith(".v")] == ["['c'].v"]
    vector = jpeft.Free(array=normal(6, 5))
    merged = jpeft.merge(params | {"jpeft_shared": {"tinylora_one": vector}})
    for n in range(3):  # the layers of a stack have a vector in common, and projections of their own
        node = params["a"]
        term = node.a[n] @ jnp.einsum("n,nij->ij", vector.array, node.p[n]) @ node.b[n]
        np.testing.assert_allclose(merged["a"][n], node.base[n] + term, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 5}, "9 inputs and 4 outputs has no part of rank 5"),
        ({"length": 0}, "a vector of at least one number"),
        ({"group": {"up": "one"}}, "`group` says nothing of the target 'down'"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)
