"""AdaMix: routes, means, and the loss that draws two passes together."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import normal, waves

import jpeft
from jpeft._tree import nodes_of
from jpeft.testing import shaken, subject


KEYS = jax.random.split(jax.random.key(5), 64)
METHODS = {
    "adapters": (lambda p, **how: jpeft.adamix(p, width=4, **how), jpeft.AdaMix, jpeft.Bottleneck),
    "lora": (lambda p, **how: jpeft.adamix_lora(p, rank=3, alpha=6, **how), jpeft.AdaMixLoRA, jpeft.LoRA),
}
NEVER_SHARED = {"adapters": {"sharing_up": False}, "lora": {"sharing_b": False}}


def tuned(name, scan=False, **options):
    """A model, and its parameters with experts, all their arrays random."""
    model = subject("decoder", scan)
    trainable, frozen = jpeft.partition(METHODS[name][0](model.params, sites=model.sites, **options))
    return model, jpeft.combine(shaken(trainable, jax.random.key(8), 0.3), frozen)


@functools.cache
def call(model):
    """The model's output with a key."""
    return jax.jit(lambda params, key: jpeft.apply(model.model, {"params": params}, *model.args, rngs={"dropout": key}))


def close(found, want, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


@pytest.mark.parametrize("name", METHODS)
def test_one_expert_is_the_plain_adapter(name):
    """Whatever the key; two passes agree."""
    model, params = tuned(name, experts=1)
    plain = jpeft.collapse(params)
    _, kind, of = METHODS[name]
    assert set(nodes_of(plain, of)) == set(nodes_of(params, kind)) and not nodes_of(plain, kind)
    y = model.run(plain)
    close(model.run(params), y)
    passes = [call(model)(params, key) for key in KEYS[:2]]
    close(passes, [y, y])
    assert jpeft.consistency(*passes) < 1e-6


@pytest.mark.parametrize("name", METHODS)
def test_of_experts_that_are_the_same_no_route_matters(name):
    model, params = tuned(name, **NEVER_SHARED[name])
    trainable, frozen = jpeft.partition(params)
    params = jpeft.combine(jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), trainable), frozen)
    y = model.run(params)
    assert np.abs(y - model.output).max() > 0.1
    close([call(model)(params, key) for key in KEYS[:3]], [y] * 3)


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", METHODS)
def test_at_rest_it_is_the_adapter_of_mean_arrays(name, scan):
    model, params = tuned(name, scan, **NEVER_SHARED[name])
    plain = jpeft.collapse(params)
    close(model.run(plain), model.run(params))
    _, kind, of = METHODS[name]
    made = nodes_of(plain, of)
    for path, node in nodes_of(params, kind).items():
        axis = node.axes.count("s") if name == "lora" else int(scan)
        for field in ("a", "b") if name == "lora" else ("down", "down_bias", "up", "up_bias"):
            close(getattr(made[path], field), np.mean(getattr(node, field), axis))


def test_at_rest_it_stands_where_it_stood():
    """On a quantized base and on another LoRA, and beneath one."""
    model = subject("decoder", base="int8")
    make = jpeft.chain(jpeft.lora(rank=2), jpeft.adamix_lora(rank=3), jpeft.lora(rank=1))
    trainable, frozen = jpeft.partition(make(model.params, sites=model.sites))
    params = jpeft.combine(shaken(trainable, jax.random.key(1), 0.3), frozen)
    node = jpeft.collapse(params)["layers_0"]["mlp"]["up"]["kernel"]
    assert [type(x) for x in (node, node.base, node.base.base, node.base.base.base)] == [jpeft.LoRA] * 3 + [jpeft.Int8]
    assert [x.a.shape[-1] for x in (node, node.base, node.base.base)] == [1, 3, 2]
    close(model.run(jpeft.collapse(params)), model.run(params))


def test_the_mean_of_factors_is_not_that_of_products():
    """A and B are averaged each by itself."""
    tree = jpeft.adamix_lora({"w": {"kernel": jnp.zeros((6, 5))}}, experts=3, rank=2, sharing_b=False)
    node = shaken(tree["w"]["kernel"].replace(base=None), jax.random.key(0), 1.0).replace(base=jnp.zeros((6, 5)))
    merged = jpeft.merge({"w": {"kernel": node}})["w"]["kernel"]
    close(merged, np.mean(node.a, 0) @ np.mean(node.b, 0))
    assert np.abs(merged - np.mean(node.a @ node.b, 0)).max() > 0.1


def adapter(experts, activation):
    """An AdaMix by itself, of features 6 and width 3."""
    sizes = {"down": (6, 3), "down_bias": (3,), "up": (3, 6), "up_bias": (6,)}
    arrays = {name: normal(n, experts, *size) for n, (name, size) in enumerate(sizes.items())}
    return jpeft.AdaMix(**arrays, activation=activation)


def test_every_route_is_as_likely():
    """i and j are independent and uniform; where all is linear, the mean of all routes is the adapter of means."""
    experts, keys = 3, jax.random.split(jax.random.key(2), 9000)
    node, h = adapter(experts, "identity"), normal(7, 4, 6)
    routes = jax.vmap(node.routed)(keys)
    i, j = (
        jnp.argmin(jnp.abs(x[:, None] - own[None]).sum(range(2, x.ndim + 1)), axis=1)
        for x, own in ((routes.down, node.down), (routes.up, node.up))
    )
    np.testing.assert_array_equal(routes.down_bias, node.down_bias[i])  # with the kernel that it belongs to
    np.testing.assert_array_equal(routes.up_bias, node.up_bias[j])
    counts = np.bincount(experts * i + j, minlength=experts**2)
    assert np.abs(counts - 1000).max() < 5 * (1000 * (1 - 1 / 9)) ** 0.5

    one = lambda i, j: (h @ node.down[i] + node.down_bias[i][None]) @ node.up[j] + node.up_bias[j][None]
    every = [one(i, j) for i, j in itertools.product(range(experts), repeat=2)]
    close(node.change(h, None), sum(every) / experts**2)
    found = np.asarray(jax.vmap(lambda key: node.change(h, key))(keys[:20]))
    assert all(min(np.abs(y - z).max() for z in every) < 1e-4 for y in found)
    bent, changes = adapter(experts, "gelu"), jax.vmap(lambda key: adapter(experts, "gelu").change(h, key))(keys)
    assert np.abs(bent.change(h, None) - changes.mean(0)).max() > 0.1


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", METHODS)
def test_every_layer_and_every_pass_has_a_route_of_its_own(name, scan):
    """Only the experts of a call's route have gradients."""
    model, params = tuned(name, scan, **NEVER_SHARED[name])
    trainable, frozen = jpeft.partition(params)

    def routes(key):
        grads = jax.grad(lambda t: waves(call(model)(jpeft.combine(t, frozen), key)))(trainable)
        nodes = [x for n, x in sorted(nodes_of(grads, METHODS[name][1]).items()) if "mlp/down" in n]
        both = ("down", "up") if name == "adapters" else ("a", "b")
        used = lambda x: jnp.any(x.reshape(-1, *x.shape[-3:]) != 0, axis=(2, 3))  # (layers, experts)
        return jnp.stack([jnp.concatenate([used(getattr(x, field)) for x in nodes]) for field in both])

    used = np.asarray(jax.jit(jax.vmap(routes))(KEYS))  # (keys, projections, layers, experts)
    assert used.shape == (64, 2, 2, 4)
    assert (used.sum(-1) == 1).all()
    draws = used.argmax(-1).reshape(64, 4)
    assert all(len(np.unique(x)) == 4 for x in draws.T)  # passes are independent,
    for x, y in itertools.combinations(draws.T, 2):  # layers and projections too
        assert 4 < (x == y).sum() < 32


def test_sharing():
    """By default only the down-projections, or the A, are mixed."""
    sizes = {"w": {"kernel": jnp.zeros((8, 6))}}
    heads = lambda node, *fields: tuple(len(getattr(node, f)) for f in fields)
    of = lambda **how: jpeft.adamix(sizes, experts=5, targets="w", **how)["w"]["adamix"]
    fields = ("down", "down_bias", "up", "up_bias")
    assert heads(of(), *fields) == (5, 5, 1, 1)
    assert heads(of(sharing_up=False), *fields) == (5, 5, 5, 5)
    assert heads(of(sharing_down=True, sharing_up=False), *fields) == (1, 1, 5, 5)
    of = lambda **how: jpeft.adamix_lora(sizes, experts=5, **how)["w"]["kernel"]
    assert heads(of(), "a", "b") == (5, 1)
    assert heads(of(sharing_a=True, sharing_b=False), "a", "b") == (1, 5)


def test_experts_start_as_one_or_apart():
    sizes = {"w": {"kernel": jnp.zeros((8, 6))}}
    of = lambda **how: jpeft.adamix(sizes, targets="w", **how)["w"]["adamix"].down
    assert (of() == of()[:1]).all()
    apart = of(distinct=True)
    assert all((apart[n] != apart[m]).all() for n, m in itertools.combinations(range(4), 2))
    assert np.abs(apart).max() <= 6**-0.5
    up = jpeft.adamix(sizes, targets="w", init="bert", distinct=True, sharing_up=False)["w"]["adamix"].up
    assert len(np.unique(up)) == up.size and 0.01 < np.std(up) < 0.03


def test_training_parts_them():
    """With the loss of the first of two passes and their consistency."""
    model = subject("decoder")
    trainable, frozen = jpeft.partition(jpeft.adamix(model.params, width=4, experts=2))
    labels, tx = model.args[0], optax.adam(1e-2)

    @jax.jit
    def step(trainable, state, key):
        def loss(trainable):
            params = jpeft.combine(trainable, frozen)
            first, second = (call(model)(params, k) for k in jax.random.split(key))
            own = optax.softmax_cross_entropy_with_integer_labels(first, labels).mean()
            return own + jpeft.consistency(first, second, where=model.args[1] > 0)

        value, grads = jax.value_and_grad(loss)(trainable)
        with jax.numpy_dtype_promotion("standard"):  # Optax counts steps in integers
            updates, state = tx.update(grads, state)
        return optax.apply_updates(trainable, updates), state, value

    state, losses = tx.init(trainable), []
    for key in KEYS[:30]:
        trainable, state, value = step(trainable, state, key)
        losses.append(value)
    assert losses[-1] < losses[0] - 0.3
    for node in nodes_of(trainable, jpeft.AdaMix).values():
        assert np.abs(node.down[0] - node.down[1]).max() > 1e-3


def test_consistency():
    """Values by the formula; the gradient is half of how the probabilities differ, over the examples."""
    first, second = normal(0, 2, 3, 5), 2 * normal(1, 2, 3, 5)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in map(np.float64, (first, second)))
    both = np.sum(p * np.log(p / q) + q * np.log(q / p), -1) / 2
    close(jpeft.consistency(first, second), np.mean(both))
    where = jnp.array([[True, False, True], [False, False, True]])
    close(jpeft.consistency(first, second, where=where), np.mean(both[where]))
    found = jax.grad(jpeft.consistency, argnums=(0, 1))(first, second)
    close(found, ((p - q) / 12, (q - p) / 12))
    assert jpeft.consistency(first, first) == 0
    assert jpeft.consistency(first.astype(jnp.bfloat16), second.astype(jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("shapes", [((4, 1), (4, 1)), ((4, 3), (4, 2)), ((4, 3), (3,))])
def test_consistency_refuses(shapes):
    with pytest.raises(ValueError, match="as in regression"):
        jpeft.consistency(*map(jnp.zeros, shapes))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (jpeft.adamix(sharing_down=True, targets="w"), "nothing to mix"),
        (jpeft.adamix_lora(sharing_a=True), "nothing to mix"),
        (jpeft.adamix(experts=0, targets="w"), "experts=0"),
        (jpeft.adamix_lora(experts=0), "experts=0"),
        (jpeft.adamix(width=0, targets="w"), "width=0"),
        (jpeft.adamix(dropout=1.0, targets="w"), "dropout=1.0"),
        (jpeft.adamix(activation="swoosh", targets="w"), "'swoosh'"),
        (jpeft.adamix(init="ones", targets="w"), "'ones': one of zero"),
        (jpeft.adamix_lora(rank=0), "rank=0"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make({"w": {"kernel": jnp.zeros((8, 6))}})
