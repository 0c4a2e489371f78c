"""What is unfrozen trains as in full fine-tuning, and nothing else does."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import waves
from tuning import train, trained_paths

import jpeft
from jpeft._targets import named_leaves
from jpeft.testing import subject


def fine_tuned(model, params):
    """The merged parameters after training what trains of `params`."""
    trainable, frozen = jpeft.partition(params)
    trainable = train(lambda t: waves(model(jpeft.combine(t, frozen))), trainable)
    return jpeft.merge(jpeft.combine(trainable, frozen))


def test_all_is_full_fine_tuning():
    model = subject("decoder")
    full = train(lambda params: waves(model.model.apply({"params": params}, *model.args)), model.params)
    chex.assert_trees_all_close(
        fine_tuned(model, jpeft.unfreeze(model.params, targets=".*")), full, rtol=1e-5, atol=1e-6
    )
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), full, model.params)
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize(
    ("kind", "method", "ending"),
    [
        ("encoder", jpeft.bitfit, "/bias"),
        ("decoder", jpeft.norms, "/scale"),
        ("encoder", jpeft.norms, ("norm/scale", "norm/bias")),
    ],
)
def test_some_is_full_fine_tuning_of_them(kind, method, ending):
    """As if the updates of all others were zero; those stay bitwise."""
    model = subject(kind)
    chosen = {name for name in named_leaves(model.params) if name.endswith(ending)}
    tuned = method(model.params)
    assert trained_paths(tuned) == chosen
    found, base = named_leaves(fine_tuned(model, tuned)), named_leaves(model.params)

    def loss(part):
        pick = lambda path, x: part.get("/".join(k.key for k in path), x)
        params = jax.tree_util.tree_map_with_path(pick, model.params)
        return waves(model.model.apply({"params": params}, *model.args))

    want = train(loss, {name: base[name] for name in chosen})
    for name, x in found.items():
        if name in chosen:
            np.testing.assert_allclose(x, want[name], rtol=1e-5, atol=1e-6, err_msg=name)
            assert (x != base[name]).any()
        else:
            np.testing.assert_array_equal(x, base[name], err_msg=name)


W, V = jnp.ones((4, 4)), jnp.ones(4)
T5 = {
    "relative_attention_bias": {"embedding": W},
    "query": {"kernel": W},
    "norm": {"scale": V},
}


def test_norms():
    params = T5 | {"out": {"kernel": W, "bias": V}, "last_norm": {"scale": V, "bias": V}}
    assert trained_paths(jpeft.norms(params)) == {"norm/scale", "last_norm/scale", "last_norm/bias"}
    assert trained_paths(jpeft.norms(params, targets="last.*")) == {"last_norm/scale", "last_norm/bias"}
    with pytest.raises(ValueError, match="matches no norm"):
        jpeft.norms({"out": {"kernel": W, "bias": V}})
    with pytest.raises(ValueError, match=r"'out/\.\*' matches no parameter"):
        jpeft.norms(params, targets="out/.*")


@pytest.mark.parametrize("targets", [[], lambda path, x: False])
def test_nothing_is_refused(targets):
    with pytest.raises(ValueError, match=r"no parameter|There are 2"):
        jpeft.unfreeze({"dense": {"kernel": W, "bias": V}}, targets=targets)


def test_optax_masked_is_no_freezing():
    """It hands the gradients of the others on as updates; `optax.partition` with `jpeft.labels` sets them to zero."""
    params = jpeft.unfreeze({"kernel": W, "bias": V}, targets="bias")
    grads = jax.tree.map(jnp.ones_like, params)

    def stepped(tx):
        updates, _ = tx.update(grads, tx.init(params), params)
        return jpeft.merge(optax.apply_updates(params, updates))

    trains = jax.tree.map(lambda label: label == "trainable", jpeft.labels(params))
    leaky = stepped(optax.masked(optax.sgd(0.5), trains))
    np.testing.assert_array_equal(leaky["kernel"], W + 1)
    sound = stepped(optax.partition({"trainable": optax.sgd(0.5), "frozen": optax.set_to_zero()}, jpeft.labels))
    np.testing.assert_array_equal(sound["kernel"], W)
    for after in (leaky, sound):
        np.testing.assert_array_equal(after["bias"], V - 0.5)


@pytest.mark.parametrize("method", [jpeft.lora(rank=2), jpeft.int8(), jpeft.unfreeze(targets=".*kernel")])
def test_a_node_cannot_be_unfrozen(method):
    params = method({"dense": {"kernel": W, "bias": V}})
    with pytest.raises(ValueError, match=r"(?s)dense/kernel: \w+.*Apply this one first.*`targets`"):
        jpeft.unfreeze(params, targets=".*")
    assert "dense/bias" in trained_paths(jpeft.unfreeze(params, targets=".*bias"))


def test_the_remedy():
    """Applied first, the kernel and the term that is added to it both train."""
    model, x = nn.Dense(3), jax.random.normal(jax.random.key(0), (5, 4))
    params = jpeft.chain(jpeft.unfreeze(targets="kernel"), jpeft.lora(rank=2, alpha=6))(
        model.init(jax.random.key(1), x)["params"]
    )
    node = params["kernel"] = params["kernel"].replace(b=jnp.ones((2, 3)))
    trainable, frozen = jpeft.partition(params)
    gradient = jax.grad(lambda t: waves(jpeft.apply(model, {"params": jpeft.combine(t, frozen)}, x)))(trainable)[
        "kernel"
    ]
    full = jax.grad(lambda w: waves(x @ w))(node.base.array + 3 * node.a @ node.b)
    np.testing.assert_allclose(gradient.base.array, full, rtol=1e-4)
    np.testing.assert_allclose(gradient.a, 3 * full @ node.b.T, rtol=1e-4)
    np.testing.assert_allclose(gradient.b, 3 * node.a.T @ full, rtol=1e-4)


def test_a_box_stays():
    params = {"kernel": nn.Partitioned(W, names=("embed", None))}
    merged = jpeft.merge(jpeft.unfreeze(params, targets=".*"))
    assert isinstance(merged["kernel"], nn.Partitioned) and merged["kernel"].names == ("embed", None)
