"""Compacter against adapters of the dense matrices."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal, waves

import jpeft
from jpeft._tree import map_nodes, nodes_of
from jpeft.testing import shaken, subject


CASES = {
    "compacter": {},
    "compacter++": {"placement": "compacter++", "rank": 2},
    "phm": {"rank": None, "rule": "own"},
    "frozen": {"rule": "frozen", "terms": 4},
}


def tuned(scan=False, **options):
    """A model, and its parameters with adapters whose arrays are all random and not small."""
    model = subject("decoder", scan)
    options = {"terms": 2, "reduction": 4, "deviation": 0.5} | options
    trainable, frozen = jpeft.partition(jpeft.compacter(model.params, sites=model.sites, **options))
    return model, jpeft.combine(shaken(trainable, jax.random.key(8), 0.5), frozen)


def rule_of(params):
    rule = params["jpeft_shared"]["compacter_rule"]
    return rule.array if isinstance(rule, jpeft.Free) else rule


def dense(params):
    """The same with `Bottleneck`s."""

    def one(node):
        return jpeft.Bottleneck(
            down=matrix(node.rule, node.down_left, node.down_right),
            down_bias=node.down_bias,
            up=matrix(node.rule, node.up_left, node.up_right),
            up_bias=node.up_bias,
        )

    def of(node):
        stack = node.up_bias.shape[:-1]
        if isinstance(node.rule, jpeft.Ref):
            node = node.replace(rule=jnp.broadcast_to(rule_of(params), (*stack, *rule_of(params).shape)))
        return jax.vmap(one)(node) if stack else one(node)

    return {k: x for k, x in map_nodes(of, params, jpeft.Compacter).items() if k != "jpeft_shared"}


def matrix(rule, left, right):
    parts = left if right is None else left @ right
    return sum(jnp.kron(a, part) for a, part in zip(rule, parts, strict=True))


def slope(run, params):
    trainable, frozen = jpeft.partition(params)
    return jax.jit(jax.value_and_grad(lambda t: waves(run(jpeft.combine(t, frozen)))))(trainable)


def close(found, want, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_is_the_dense_adapter(case, scan):
    """Its output, and every gradient, that of the rule too."""
    model, params = tuned(scan, **CASES[case])
    assert np.abs(model.run(params) - model.output).max() > 0.1
    close(model.run(params), model.run(dense(params)))
    close(slope(model, params), slope(lambda p: model(dense(p)), params), 1e-4)


def test_entries():
    """D[a P + p, b Q + q] = sum_i A_i[a, b] (S_i T_i)[p, q], so that y = h D + d: the rule is of blocks."""
    terms, parts, widths = 3, 4, 2
    node = jpeft.Compacter(
        rule=normal(0, terms, terms, terms),
        down_left=normal(1, terms, parts, 2),
        down_right=normal(2, terms, 2, widths),
        down_bias=normal(3, terms * widths),
        up_left=normal(4, terms, widths, terms * parts),
        up_right=None,
        up_bias=normal(5, terms * terms * parts),
    )
    d = np.zeros((terms * parts, terms * widths))
    for i, a, b, p, q in np.ndindex(terms, terms, terms, parts, widths):
        d[a * parts + p, b * widths + q] += node.rule[i, a, b] * (node.down_left[i, p] @ node.down_right[i, :, q])
    h = normal(6, 5, terms * parts)
    up = matrix(node.rule, node.up_left, None)
    want = jax.nn.gelu(h @ jnp.asarray(d, jnp.float32) + node.down_bias[None]) @ up + node.up_bias[None]
    close(node.change(h, None), want)


def test_one_term_is_an_adapter_of_low_rank():
    _, params = tuned(terms=1, rank=2)
    for node in nodes_of(params, jpeft.Compacter).values():
        scale = rule_of(params)[0, 0, 0]
        down, up = (scale * left[0] @ right[0] for left, right in (
            (node.down_left, node.down_right), (node.up_left, node.up_right)))  # fmt: skip
        assert np.linalg.matrix_rank(down) == np.linalg.matrix_rank(up) == 2
        plain = jpeft.Bottleneck(down=down, down_bias=node.down_bias, up=up, up_bias=node.up_bias)
        h = normal(7, 2, 3, 16)
        close(node.replace(rule=rule_of(params)).change(h, None), plain.change(h, None))


def arrays_of(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (x.aval for x in eqn.outvars)
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from arrays_of(inner)


def test_no_matrix_is_formed():
    """Neither forwards nor backwards, of however few tokens."""
    features, width, terms = 256, 64, 4
    params = jpeft.compacter({"kernel": jnp.zeros((8, features))}, terms=terms, reduction=4, rule="own", targets="")
    node, h = params["compacter"], normal(0, 1, 2, features)
    assert node.down_bias.shape == (width,)
    run = lambda node, h: jnp.sum(node.change(h, None) ** 2)
    largest = max(x.size for x in arrays_of(jax.make_jaxpr(jax.grad(run, argnums=(0, 1)))(node, h).jaxpr))
    assert largest <= terms * h.size < features * width / 4
    flops = jax.jit(lambda h: node.change(h, None)).lower(h).cost_analysis()["flops"]
    assert flops < 2 * h.size * width  # half of the dense products'


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_rule_is_one_leaf(scan):
    """Its gradient is the sum of those of rules of their own, of layers that are scanned too."""
    model, params = tuned(scan)
    assert set(params["jpeft_shared"]) == {"compacter_rule"}
    own = lambda node: node.replace(rule=jnp.broadcast_to(rule_of(params), (*node.rule.stack, 2, 2, 2)))
    apart = {k: x for k, x in map_nodes(own, params, jpeft.Compacter).items() if k != "jpeft_shared"}
    together = slope(model, params)[1]["jpeft_shared"]["compacter_rule"].array
    each = [x.rule for x in nodes_of(slope(model, apart)[1], jpeft.Compacter).values()]
    assert sum(x.size for x in each) == 4 * 2**3
    close(together, sum(x.reshape(-1, 2, 2, 2).sum(0) for x in each), 1e-4)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_placements(kind):
    model = subject(kind)
    for placement, places in (("compacter", ("attention/out", "mlp/down")), ("compacter++", ("mlp/down",))):
        params = jpeft.compacter(model.params, terms=2, reduction=4, placement=placement)
        found = {name.removesuffix("/compacter") for name in nodes_of(params, jpeft.Compacter)}
        assert found == {f"layers_{n}/{place}" for n in range(2) for place in places}


def test_start():
    """The rule is normal, the factors are Glorot-uniform with a gain of the square root of 2, the biases zero."""
    params = jpeft.compacter({"kernel": jnp.zeros((8, 768))}, terms=12, rank=3, targets="")
    rule, node = rule_of(params), params["compacter"]
    assert abs(np.std(rule) / 0.01 - 1) < 0.1 and abs(np.mean(rule)) < 0.001
    assert (node.down_bias == 0).all() and (node.up_bias == 0).all()
    sizes = {"down_left": (12, 64, 3), "down_right": (12, 3, 2), "up_left": (12, 2, 3), "up_right": (12, 3, 64)}
    for name, size in sizes.items():
        x, limit = getattr(node, name), 2**0.5 * (6 / (size[1] + size[2])) ** 0.5
        assert x.shape == size
        assert 0.9 * limit < np.abs(x).max() <= limit
        assert abs(np.std(x) / (limit / 3**0.5) - 1) < 0.2
    other = rule_of(jpeft.compacter({"kernel": jnp.zeros((8, 768))}, terms=12, deviation=1e-4, targets=""))
    close(100 * other, rule)


def test_what_trains():
    """A rule that is frozen does not, and one's own is in its node."""
    count = lambda **options: jpeft.summary(tuned(**options)[1]).trainable
    assert count() - count(rule="frozen") == 2**3
    assert count(rule="own") - count(rule="frozen") == 4 * 2**3
    assert "jpeft_shared" not in tuned(rule="own")[1]


def test_a_second_one_has_a_rule_of_its_own():
    _, params = tuned()
    again = jpeft.compacter(params, terms=4, reduction=2, placement="compacter++")
    assert set(again["jpeft_shared"]) == {"compacter_rule", "compacter_rule_1"}
    nodes = nodes_of(again, jpeft.Compacter)
    assert {x.rule.name for n, x in nodes.items() if n.endswith("_1")} == {"compacter_rule_1"}
    assert {x.rule.name for n, x in nodes.items() if not n.endswith("_1")} == {"compacter_rule"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"terms": 3}, r"(?s)out: 16 features, a width of 4, 3 terms\n  layers_0/mlp.*layers_1/mlp/down.*Take other"),
        ({"terms": 8}, "a width of 4, 8 terms"),
        ({"reduction": 32}, "16 features, a width of 0"),
        ({"reduction": 3, "terms": 4, "rank": None}, "a width of 5"),
        ({"terms": 0}, "at least one, not terms=0"),
        ({"reduction": 0}, "not reduction=0"),
        ({"rank": 0}, "rank=0"),
        ({"rule": "learnt"}, "shared, frozen, own"),
        ({"placement": "phm"}, r"compacter, compacter\+\+"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        tuned(**options)
