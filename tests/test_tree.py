"""Trees: chains, partitions, labels, merging, and arrays that many sites share."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft import Frozen, Trainable
from jpeft._shared import SHARED
from jpeft.testing import subject


class Net(nn.Module):
    scan: bool = False

    @nn.compact
    def __call__(self, x):
        if self.scan:
            layer = lambda dense, x, _: (nn.tanh(dense(x)), None)
            over = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return over(nn.Dense(6, name="layers"), x, None)[0]
        for n in range(3):
            x = nn.tanh(nn.Dense(6, name=f"layers_{n}")(x))
        return x


X = jax.random.normal(jax.random.key(1), (4, 6))


@pytest.fixture
def params():
    return Net().init(jax.random.key(0), X)["params"]


def test_chain_gives_every_transform_its_own_key(params):
    twice = jpeft.chain(jpeft.lora(rank=2), jpeft.lora(rank=2))(params, key=jax.random.key(3))
    outer = twice["layers_0"]["kernel"]
    assert isinstance(outer.base, jpeft.LoRA)
    assert (outer.a != outer.base.a).any()
    assert (twice["layers_0"]["kernel"].a != twice["layers_1"]["kernel"].a).any()
    again = jpeft.chain(jpeft.lora(rank=2), jpeft.lora(rank=2))(params, key=jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, again, twice)


def test_without_a_key_it_is_key_zero(params):
    jax.tree.map(np.testing.assert_array_equal, jpeft.lora(params), jpeft.lora(params, key=jax.random.key(0)))


def test_partition_has_none_where_the_other_has_its_array(params):
    trainable, frozen = jpeft.partition(jpeft.lora(params, rank=2))
    assert trainable["layers_0"]["bias"] is None
    assert trainable["layers_0"]["kernel"].base is None
    assert frozen["layers_0"]["kernel"].a is None
    assert frozen["layers_0"]["kernel"].base.shape == (6, 6)
    assert len(jax.tree.leaves(optax.adam(1.0).init(trainable))) == 1 + 2 * 6


def test_labels_freeze_with_optax(params):
    tuned = jpeft.lora(params, rank=2)
    tx = optax.partition({"trainable": optax.adamw(0.1, weight_decay=0.5), "frozen": optax.set_to_zero()}, jpeft.labels)
    grads = jax.grad(lambda p: jpeft.apply(Net(), {"params": p}, X).sum())(tuned)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(grads, tx.init(tuned), tuned)
    after = optax.apply_updates(tuned, updates)
    jax.tree.map(np.testing.assert_array_equal, jpeft.partition(after)[1], jpeft.partition(tuned)[1])
    assert (after["layers_0"]["kernel"].b != tuned["layers_0"]["kernel"].b).all()


def test_a_bfloat16_merge_sums_in_float32():
    w = jnp.full((4, 4), 256.0, jnp.bfloat16)  # where the next number is 258
    node = jpeft.LoRA(base=w, a=jnp.ones((4, 1)), b=jnp.full((1, 4), 0.75), scale=1.0)
    twice = jpeft.LoRA(base=node, a=jnp.ones((4, 1)), b=jnp.full((1, 4), 0.75), scale=1.0)
    assert jpeft.merge({"w": node})["w"].dtype == jnp.bfloat16
    assert float(jpeft.merge({"w": twice})["w"][0, 0]) == 258.0


def test_merge_names_everything_that_cannot_be(params):
    tuned = jpeft.bottleneck(params, width=2, targets=["layers_0", "layers_2"])
    with pytest.raises(ValueError, match="cannot be merged") as e:
        jpeft.merge(tuned)
    assert "layers_0/bottleneck: Bottleneck" in str(e.value)
    assert "layers_2/bottleneck: Bottleneck" in str(e.value)


def test_strip_gives_the_base_back(params):
    tuned = jpeft.bottleneck(jpeft.lora(jpeft.lora(params)), width=2, targets="layers_1")
    jax.tree.map(np.testing.assert_array_equal, jpeft.strip(tuned), params)
    coded = jpeft.int8(params)
    jax.tree.map(np.testing.assert_array_equal, jpeft.strip(jpeft.lora(coded)), coded)


class Tied(jpeft.Branch):
    """LoRA whose first factor all sites share."""

    a: Trainable[jax.Array]
    b: Trainable[jax.Array, "rank out"]

    def weight(self, w):
        return w + self.a @ self.b

    def branch(self, x, key):
        return (x @ self.a) @ self.b


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_a_shared_array_is_one_leaf_and_its_gradients_sum(scan, trains):
    net = Net(scan=scan)
    params = net.init(jax.random.key(0), X)["params"]
    new = lambda key, w: Tied(a=jpeft.Ref("a"), b=jax.random.normal(key, (2, w.shape[1])))
    a = jax.random.normal(jax.random.key(2), (6, 2))
    sites = jpeft.sites(net, {"params": params}, X)
    tuned = jpeft.wrap(params, new, sites=sites) | {SHARED: {"a": jpeft.Free(array=a) if trains else a}}

    def separate(a):
        """Every site with a copy of its own."""
        copies = lambda x: x.replace(a=jnp.broadcast_to(a, (*x.b.shape[:-2], *a.shape))) if isinstance(x, Tied) else x
        plain = {k: x for k, x in tuned.items() if k != SHARED}
        return jpeft.merge(jax.tree.map(copies, plain, is_leaf=lambda x: isinstance(x, Tied)))

    loss = lambda p: jpeft.apply(net, {"params": p}, X).sum()
    np.testing.assert_allclose(loss(tuned), net.apply({"params": separate(a)}, X).sum(), rtol=1e-5)
    np.testing.assert_allclose(loss(tuned), net.apply({"params": jpeft.merge(tuned)}, X).sum(), rtol=1e-5)
    trainable, frozen = jpeft.partition(tuned)
    grads = jax.grad(lambda t: loss(jpeft.combine(t, frozen)))(trainable)
    assert (grads[SHARED]["a"] is not None) == trains
    if trains:
        expected = jax.grad(lambda a: net.apply({"params": separate(a)}, X).sum())(a)
        np.testing.assert_allclose(grads[SHARED]["a"].array, expected, rtol=1e-4, atol=1e-6)


def test_every_field_has_a_role():
    with pytest.raises(TypeError, match=r"`Bad\.x` must be Trainable"):
        type("Bad", (jpeft.Node,), {"__annotations__": {"x": int}})


def test_a_field_without_a_value_is_no_array():
    class Half(jpeft.Node):
        x: Trainable[jax.Array]
        y: Frozen[jax.Array | None] = None

    assert len(jax.tree.leaves(Half(x=jnp.ones(2)))) == 1
    trainable, frozen = jpeft.partition({"half": Half(x=jnp.ones(2), y=jnp.zeros(3))})
    assert trainable["half"].y is None
    assert frozen["half"].x is None


def test_nodes_beside_a_module_act_in_the_order_they_were_attached(params):
    first = jpeft.bottleneck(width=2, targets="layers_0", activation="identity", init="houlsby")

    class Double(jpeft.Additive):
        gain: Trainable[jax.Array]

        def output(self, y, *args):
            return y * self.gain

    new = lambda key, d_in, d_out: Double(gain=jnp.full((1, 1), 2.0))
    inner = jpeft.attach(first(params), new, name="a_double", targets="layers_0")  # before in the alphabet, last to act
    outer = first(jpeft.attach(params, new, name="a_double", targets="layers_0"))
    run = lambda p: jpeft.apply(Net(), {"params": p}, X)
    ad = lambda p: next(x for x in p["layers_0"].values() if isinstance(x, jpeft.Bottleneck))
    shake = lambda p: jax.tree.map(lambda x: ad(p).replace(up_bias=jnp.ones(6)) if x is ad(p) else x, p,
                                   is_leaf=lambda x: isinstance(x, jpeft.Bottleneck))  # fmt: skip
    a, b = shake(inner), shake(outer)
    dense = lambda p: X @ p["layers_0"]["kernel"] + p["layers_0"]["bias"][None]
    rest = lambda y, p: Net().apply({"params": {**p, "layers_0": {"kernel": jnp.eye(6), "bias": jnp.zeros(6)}}}, y)
    branch = lambda y: y @ ad(a).down @ ad(a).up + 1
    y = dense(params)
    np.testing.assert_allclose(run(a), rest(2 * (y + branch(y)), params), rtol=1e-5)
    np.testing.assert_allclose(run(b), rest(2 * y + branch(2 * y), params), rtol=1e-5)


def test_a_new_node_takes_the_place_of_none(params):
    """Also where an earlier one is gone: it still acts last."""
    one = jpeft.bottleneck(width=2, targets="layers_0")
    tree = one(one(params))
    kept = tree["layers_0"].pop("bottleneck_1"), tree["layers_0"].pop("bottleneck")
    tree["layers_0"]["bottleneck_1"] = kept[0]
    again = one(tree)["layers_0"]
    assert again["bottleneck_1"] is kept[0]
    assert isinstance(again["bottleneck_2"], jpeft.Bottleneck)


def test_options_of_nodes_within():
    """A node around another hands on what the model's own call does not know."""

    class Told(jpeft.Additive):
        x: Trainable[jax.Array]

        def around(self, call, key, *args, times, **kwargs):
            return call(*args, **kwargs) * times

    model = subject("decoder")
    told = {**model.params, "told": Told(x=jnp.ones(1))}
    y = jpeft.apply(model.model, {"params": told}, *model.args, times=1.0, allow_unused=True)
    both = jpeft.reft(told, rank=2, init="identity", sites=model.sites)
    found = jpeft.apply(model.model, {"params": both}, *model.args, times=2.0, allow_unused=True)
    np.testing.assert_allclose(found, 2 * y, rtol=1e-5)
    with pytest.raises(TypeError, match="unknown"):
        jpeft.apply(model.model, {"params": both}, *model.args, times=2.0, unknown=1, allow_unused=True)
