"""A prefix in the attention of other models: Flax's own, and functions of one's own, beside formulas by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_llama import close

import jpeft
from jpeft._tree import map_nodes, nodes_of
from jpeft.testing import shaken


KEYS = jax.random.split(jax.random.key(0), 4)
X = jax.random.normal(KEYS[0], (2, 5, 8))
SEEN = jnp.tril(jnp.ones((2, 1, 5, 5), bool)).at[1, :, 1:, 0].set(False)


def plain(query, key, value, mask=None, bias=None):
    """Of one's own, without anything of JAX's or Flax's."""
    scores = jnp.einsum("bqhw,bkhw->bhqk", query, key) / query.shape[-1] ** 0.5
    scores = scores if bias is None else scores + bias
    scores = scores if mask is None else jnp.where(mask, scores, -1e9)
    return jnp.einsum("bhqk,bkhw->bqhw", jax.nn.softmax(scores), value)


def positional(query, key, value, mask=None):
    return jpeft.keys_and_values(plain)(query, key, value, mask)


def of_jax(query, key, value, mask=None):
    return jpeft.keys_and_values(jax.nn.dot_product_attention)(query, key, value, mask=mask)


def project(name, x):
    return nn.DenseGeneral((2, 4), name=name)(x)


class Own(nn.Module):
    """Attention by a function."""

    attend: object = positional

    @nn.compact
    def __call__(self, x, mask=None):
        y = self.attend(project("query", x), project("key", x), project("value", x), mask)
        return nn.DenseGeneral(8, axis=(-2, -1), name="out")(y)


class SetUp(nn.Module):
    """The same, whose parts are made in `setup`."""

    attend: object = positional

    def setup(self):
        self.query, self.key, self.value = (nn.DenseGeneral((2, 4)) for _ in range(3))
        self.out = nn.DenseGeneral(8, axis=(-2, -1))

    def __call__(self, x, mask=None):
        return self.out(self.attend(self.query(x), self.key(x), self.value(x), mask))


class Flax(nn.Module):
    """Flax's attention, as it is."""

    kind: type[nn.Module] = nn.MultiHeadDotProductAttention

    @nn.compact
    def __call__(self, x, mask=None):
        return self.kind(2, name="flax")(x, mask=mask)


KINDS = {
    "own": Own(),
    "jax": Own(of_jax),
    "setup": SetUp(),
    "flax": Flax(),
    "remat": nn.remat(Flax)(),
    "remat inside": Flax(nn.remat(nn.MultiHeadDotProductAttention)),
    "jit inside": Flax(nn.jit(nn.MultiHeadDotProductAttention)),
}


def tuned(model, *args, **options):
    """The model's parameters, without and with a prefix of three."""
    params = shaken(model.init(KEYS[1], *args)["params"], KEYS[2])
    sites = jpeft.sites(model, {"params": params}, *args)
    return params, jpeft.prefix(params, length=3, sites=sites, key=KEYS[3], **options)


def by_hand(params, node, x, mask):
    """Attention to the keys of the prefix, and to those of the tokens."""
    dense = lambda name: jnp.einsum("bqd,dhw->bqhw", x, params[name]["kernel"]) + params[name]["bias"][None, None]
    before = lambda p, y: jnp.concatenate([jnp.broadcast_to(p, (len(x), *p.shape)), y], axis=1)
    mask = None if mask is None else jnp.concatenate([jnp.ones((*mask.shape[:3], 3), bool), mask.astype(bool)], axis=3)
    y = plain(dense("query"), before(node.keys, dense("key")), before(node.values, dense("value")), mask)
    return jnp.einsum("bqhw,hwd->bqd", y, params["out"]["kernel"]) + params["out"]["bias"][None, None]


MASKS = {"none": None, "bool": SEEN, "numbers": SEEN.astype(jnp.float32)}
CASES = [(kind, mask) for kind in KINDS for mask in MASKS if (kind, mask) != ("jax", "numbers")]  # which JAX refuses


@pytest.mark.parametrize(("kind", "mask"), CASES)
def test_the_prefix_stands_before_the_keys(kind, mask):
    """Outputs and gradients. Flax's masks may be of numbers, of which others than zero are true."""
    model, mask = KINDS[kind], MASKS[mask]
    params, own = tuned(model, X, mask)
    (node,) = nodes_of(own, jpeft.Prefix).values()
    wave = jnp.cos(jnp.arange(80.0)).reshape(2, 5, 8)

    def loss(node):
        y = jpeft.apply(model, {"params": map_nodes(lambda _: node, own, jpeft.Prefix)}, X, mask)
        return jnp.sum(y * wave), y

    def expected(node):
        y = by_hand(params.get("flax", params), node, X, mask)
        return jnp.sum(y * wave), y

    (_, found), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(node)
    (_, want), slopes = jax.value_and_grad(expected, has_aux=True)(node)
    close(found, want)
    close(grads.keys, slopes.keys)
    close(grads.values, slopes.values)
    assert np.abs(found - model.apply({"params": params}, X, mask)).max() > 0.1


@pytest.mark.parametrize(("kind", "mask"), CASES)
def test_without_a_prefix_nothing_changes(kind, mask):
    model, mask = KINDS[kind], MASKS[mask]
    params, _ = tuned(model, X)
    found = jpeft.apply(model, {"params": params}, X, mask)
    np.testing.assert_array_equal(found, model.apply({"params": params}, X, mask))


class Scanned(nn.Module):
    """Three layers of Flax's attention, stacked."""

    remat: bool = False

    @nn.compact
    def __call__(self, x, mask=None):
        layer = nn.remat(Flax) if self.remat else Flax
        step = lambda layer, x, mask: (x + layer(x, mask), None)
        scan = nn.scan(step, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=3)
        return scan(layer(name="layers"), x, mask)[0]


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layers_have_each_their_own(remat):
    params, own = tuned(Scanned(remat), X, SEEN)
    (node,) = nodes_of(own, jpeft.Prefix).values()
    assert node.keys.shape == (3, 3, 2, 4)
    x, layer = X, lambda tree, n: jax.tree.map(lambda a: a[n], tree)
    for n in range(3):
        x = x + by_hand(layer(params["layers"]["flax"], n), layer(node, n), x, SEEN)
    close(jpeft.apply(Scanned(remat), {"params": own}, X, SEEN), x)


class Decoding(nn.Module):
    """Flax's attention with its own cache."""

    decode: bool

    @nn.compact
    def __call__(self, x, mask=None):
        return nn.MultiHeadDotProductAttention(2, decode=self.decode, name="flax")(x, mask=mask)


def test_in_the_cache_of_flax():
    """One token after the other, as all at once."""
    params, own = tuned(Decoding(False), X)
    causal = jnp.tril(jnp.ones((1, 1, 5, 5), bool))
    want = by_hand(params["flax"], *nodes_of(own, jpeft.Prefix).values(), X, causal)
    model = Decoding(True)
    cache, found = model.init(KEYS[1], X)["cache"], []
    for n in range(5):
        y, changed = jpeft.apply(model, {"params": own, "cache": cache}, X[:, n : n + 1], mutable=["cache"])
        cache = changed["cache"]
        found.append(y)
    close(jnp.concatenate(found, axis=1), want)


class Twice(nn.Module):
    """Attention to the tokens, and then to a context, in one module."""

    @nn.compact
    def __call__(self, x, context):
        own, other = (jpeft.keys_and_values(plain, name=name) for name in ("kv", "context_kv"))
        x = x + own(x[:, :, None], x[:, :, None], x[:, :, None])[:, :, 0]
        return nn.Dense(8)(x + other(x[:, :, None], context[:, :, None], context[:, :, None])[:, :, 0])


def test_a_module_that_attends_twice_has_two_places():
    params, own = tuned(Twice(), X, 2 * X, targets=["kv", "context_kv"])
    assert own.keys() == {"Dense_0", "kv", "context_kv", "prefix_shift"}
    _, one = tuned(Twice(), X, 2 * X, targets="context_kv")
    run = lambda tree: jpeft.apply(Twice(), {"params": tree}, X, 2 * X)
    assert np.abs(run(one) - run(own)).max() > 0.01 < np.abs(run(one) - run(params)).max()


def test_a_bias_has_no_part_in_the_prefix():
    bias = jax.random.normal(KEYS[1], (1, 2, 5, 5))
    attend = jpeft.keys_and_values(plain)
    model = Own(lambda query, key, value, mask: attend(query, key, value, bias=bias))
    params, own = tuned(model, X)
    (node,) = nodes_of(own, jpeft.Prefix).values()
    found = jpeft.apply(model, {"params": own}, X)
    padded = jnp.pad(bias, [(0, 0)] * 3 + [(3, 0)])
    dense = lambda name: jnp.einsum("bqd,dhw->bqhw", X, params[name]["kernel"]) + params[name]["bias"][None, None]
    before = lambda p, y: jnp.concatenate([jnp.broadcast_to(p, (len(X), *p.shape)), y], axis=1)
    y = plain(dense("query"), before(node.keys, dense("key")), before(node.values, dense("value")), bias=padded)
    close(found, jnp.einsum("bqhw,hwd->bqd", y, params["out"]["kernel"]) + params["out"]["bias"][None, None])


def test_refuses_masks_that_the_function_makes_itself():
    attend = jpeft.keys_and_values(jax.nn.dot_product_attention)
    model = Own(lambda query, key, value, mask: attend(query, key, value, is_causal=True))
    params, own = tuned(model, X)
    jpeft.apply(model, {"params": params}, X)
    with pytest.raises(ValueError, match="3 keys come before those of the tokens in 'kv', which is_causal"):
        jpeft.apply(model, {"params": own}, X)
    assert attend.__name__ == "dot_product_attention"
