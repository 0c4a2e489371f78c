"""What is known of LoRA in closed form: its rank, its start, its invariance, its limit, its scale, its dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import normal

import jpeft


D_IN, D_OUT = 6, 9
X = jax.random.normal(jax.random.key(0), (5, D_IN))


def weights():
    return {"first": {"kernel": normal(1, D_IN, D_OUT)}, "second": {"kernel": normal(2, D_OUT, D_IN)}}


def model(params, x):
    return jnp.tanh(x @ params["first"]["kernel"]) @ params["second"]["kernel"]


def outputs(params, **how):
    return jpeft.apply(model, params, X, **how)


def loss(trainable, frozen):
    return jnp.sum(outputs(jpeft.combine(trainable, frozen)) ** 2)


def adapted(**options):
    """The weights with LoRA, A and B random."""
    params = jpeft.lora(weights(), **options)
    return jax.tree.map(lambda x: x + normal(3, *x.shape), params)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((6, 9), "io"), ((6, 3, 3), "ioo"), ((3, 3, 6), "iio"), ((4, 6, 9), "sio"), ((9, 6), "oi"), ((3, 2, 9), "iio")],
)
def test_rank(shape, axes):
    """rank(dW) = r, for every matrix of a stack."""
    params = jpeft.lora({"kernel": jnp.zeros(shape)}, rank=2, targets={"kernel": axes}, key=jax.random.key(1))
    node = params["kernel"]
    change = jpeft.merge({"kernel": node.replace(b=normal(0, *node.b.shape))})["kernel"]
    order = [n for letter in "sio" for n, c in enumerate(axes) if c == letter]
    size = lambda letter: int(np.prod([n for n, c in zip(shape, axes, strict=True) if c == letter]))
    matrices = jnp.transpose(change, order).reshape(-1, size("i"), size("o"))
    np.testing.assert_array_equal(jnp.linalg.matrix_rank(matrices), np.full(len(matrices), 2))


@pytest.mark.parametrize("init", ["uniform", "gaussian", "orthogonal"])
def test_start(init):
    """W' = W, dL/dA = 0 and dL/dB != 0."""
    params = jpeft.lora(weights(), rank=3, init=init)
    np.testing.assert_array_equal(outputs(params), model(weights(), X))
    gradients = jax.grad(loss)(*jpeft.partition(params))
    for node in (gradients["first"]["kernel"], gradients["second"]["kernel"]):
        assert np.all(node.a == 0) and np.all(node.b != 0)


def test_factors_are_known_up_to_an_invertible_matrix():
    params, q = adapted(rank=4, alpha=2), normal(7, 4, 4)
    turn = lambda node: node.replace(a=node.a @ q, b=jnp.linalg.solve(q, node.b))
    turned = {name: {"kernel": turn(layer["kernel"])} for name, layer in params.items()}
    np.testing.assert_allclose(outputs(turned), outputs(params), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        jpeft.merge(turned)["first"]["kernel"], jpeft.merge(params)["first"]["kernel"], rtol=1e-4
    )


def test_a_of_one_is_full_fine_tuning():
    """With r = min(in, out) and the thin factor I, the other one is trained as the kernel itself is."""
    params = jpeft.lora(weights(), rank=D_IN)
    one = {"first": "a", "second": "b"}
    fixed = {name: {"kernel": params[name]["kernel"].replace(**{f: jnp.eye(D_IN)})} for name, f in one.items()}
    fixed["second"]["kernel"] = fixed["second"]["kernel"].replace(a=jnp.zeros((D_OUT, D_IN)))
    free = {name: {"a": "b", "b": "a"}[f] for name, f in one.items()}
    start = {name: getattr(fixed[name]["kernel"], f) for name, f in free.items()}

    def through_lora(factors):
        nodes = {name: {"kernel": fixed[name]["kernel"].replace(**{free[name]: x})} for name, x in factors.items()}
        return jnp.sum(outputs(nodes) ** 2)

    def directly(change):
        return jnp.sum(model({name: {"kernel": w["kernel"] + change[name]} for name, w in weights().items()}, X) ** 2)

    found, want = trained(through_lora, start), trained(directly, {n: jnp.zeros_like(x) for n, x in start.items()})
    for name in one:
        assert np.abs(want[name]).max() > 0.01
        np.testing.assert_allclose(found[name], want[name], rtol=1e-4, atol=1e-6)


def trained(loss, tree):
    tx = optax.sgd(1e-3, momentum=0.9)
    state = tx.init(tree)
    for _ in range(4):
        updates, state = tx.update(jax.grad(loss)(tree), state)
        tree = optax.apply_updates(tree, updates)
    return tree


def test_scale():
    """s = alpha / r, alpha / sqrt(r) for rslora, and 1 where there is no alpha."""
    scale = lambda **options: jpeft.lora(weights(), rank=4, **options)["first"]["kernel"].scale
    assert (scale(), scale(alpha=8), scale(alpha=8, rslora=True)) == (1, 2, 4)
    params = adapted(rank=4, alpha=3, rslora=True)
    same = jax.tree.unflatten(jax.tree.structure(adapted(rank=4, alpha=6)), jax.tree.leaves(params))
    np.testing.assert_allclose(outputs(params), outputs(same), rtol=1e-6)


@pytest.mark.parametrize("rank", [4, 16, 64, 256])
def test_variance_of_what_is_added(rank):
    """Of x and B ~ N(0, 1) it is alpha^2 / 3 for every rank with rslora, and alpha^2 / 3r without."""
    x, w = normal(0, 128, 512), {"kernel": jnp.zeros((512, 512))}
    for rslora, want in ((True, 1 / 3), (False, 1 / (3 * rank))):
        node = jpeft.lora(w, rank=rank, alpha=1, rslora=rslora)["kernel"]
        y = jpeft.apply(lambda p, x: x @ p["kernel"], {"kernel": node.replace(b=normal(1, *node.b.shape))}, x)
        np.testing.assert_allclose(jnp.var(y), want, rtol=0.1)


def test_options_by_pattern():
    options = {"rank": {"first/.*": 4, ".*": 2}, "alpha": {"second/.*": 6, ".*": None}, "dropout": {".*/kernel": 0.5}}
    params = jpeft.lora(weights(), **options)
    first, second = params["first"]["kernel"], params["second"]["kernel"]
    assert (first.a.shape, first.b.shape, first.scale, first.dropout) == ((D_IN, 4), (4, D_OUT), 1, 0.5)
    assert (second.a.shape, second.b.shape, second.scale, second.dropout) == ((D_OUT, 2), (2, D_IN), 3, 0.5)


def test_dropout_is_of_the_branch_alone():
    """The base's product is that of the whole input; what is added is s drop(x) A B."""
    node = adapted(rank=3, alpha=6, dropout=0.5)["first"]["kernel"]
    product = lambda node, **how: jpeft.apply(lambda p, x: x @ p["kernel"], {"kernel": node}, X, **how)
    key = jax.random.key(9)
    dropped = product(node, rngs=key)
    np.testing.assert_array_equal(product(node.replace(b=0 * node.b), rngs=key), X @ node.base)
    np.testing.assert_allclose(product(node), X @ node.base + 2 * X @ node.a @ node.b, rtol=1e-4, atol=1e-4)
    mask = product(node.replace(base=jnp.zeros((D_IN, D_IN)), a=jnp.eye(D_IN), b=jnp.eye(D_IN)), rngs=key) / (2 * X)
    assert set(np.round(np.unique(mask), 5)) == {0, 2}
    np.testing.assert_allclose(dropped, X @ node.base + 2 * (mask * X) @ node.a @ node.b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank of at least 1"),
        ({"alpha": 0}, "`alpha` is 0: it must be above 0"),
        ({"rank": {"second/.*": 0, ".*": 2}}, "rank of at least 1"),
        ({"dropout": 1.0}, "dropout in"),
        ({"dropout": -0.1}, "dropout in"),
        ({"init": "kaiming"}, "'kaiming': one of uniform, gaussian, orthogonal, embedding"),
        ({"targets": ["first/kernel", "frist/kernel"]}, "'frist/kernel' matches no parameter. Near: first/kernel"),
        ({"rank": {"third/.*": 4, ".*": 2}}, "'third/.*' matches no target of the option `rank`"),
        ({"alpha": {"first/.*": 4}}, "`alpha` says nothing of the target 'second/kernel'"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.lora(weights(), **options)


def test_refuses_an_option_that_it_has_not():
    with pytest.raises(TypeError, match="r"):
        jpeft.lora(r=8)
