"""SparseAdapter: scores by hand, densities that are exact, and zeros that stay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.optim import masked_updates
from jpeft.testing import subject


MATRICES = ("down", "up")


def adapters(kind="decoder", scan=False, width=4, **options):
    model = subject(kind, scan=scan)
    return model, jpeft.bottleneck(model.params, width=width, init="bert", sites=model.sites, **options)


def loss_fn(model):
    """Of a model with other tokens for every batch."""
    return lambda params, ids: jnp.mean(jnp.square(jpeft.apply(model.model, {"params": params}, ids) - 1))


def named(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path): x for path, x in leaves}


def trained_of(params):
    return named(jpeft.partition(params)[0])


def nonzero(params):
    return sum(np.count_nonzero(x) for name, x in trained_of(params).items() if name.endswith(MATRICES))


BATCHES = [jnp.array([[1, 2, 3, 4]]), jnp.array([[5, 6, 7, 8]])]


@pytest.mark.parametrize("score", ["magnitude", "random", "snip", "grasp", "synflow"])
@pytest.mark.parametrize(("scope", "scan"), [("all", False), ("each", False), ("each", True)])
def test_density_is_exact(score, scope, scan):
    model, params = adapters(scan=scan)
    how = {"loss_fn": loss_fn(model), "batches": BATCHES} if score in ("snip", "grasp") else {}
    pruned, mask = jpeft.sparse_adapter(params, density=0.29, score=score, scope=scope, **how)
    before, after = trained_of(params), trained_of(pruned)
    assert set(mask) == set(before) == set(after)
    sizes = []
    for name, x in after.items():
        np.testing.assert_array_equal(x, np.where(mask[name], before[name], 0))
        if name.endswith(MATRICES):
            sizes.append(mask[name].sum(axis=(-1, -2)))
        else:
            assert mask[name] is np.True_
    each = int(0.29 * 16 * 4)
    if scope == "each":
        assert set(np.concatenate([np.ravel(x) for x in sizes]).tolist()) == {each}
    else:
        assert sum(np.sum(x) for x in sizes) == int(0.29 * 8 * 16 * 4)
        assert {int(x) for x in sizes} != {each}


def flat(params, names):
    """The entries of the arrays of these names in one vector, and the way back."""
    trainable, frozen = jpeft.partition(params)
    own = {name: x for name, x in named(trainable).items() if name in names}
    vector, unravel = jax.flatten_util.ravel_pytree(own)

    def back(vector):
        new = unravel(vector)
        leaves, structure = jax.tree.flatten(trainable)
        filled = [new.get(name, x) for name, x in zip(named(trainable), leaves, strict=True)]
        return jpeft.combine(structure.unflatten(filled), frozen)

    return vector, back, own


def test_scores_are_those_of_the_formulas():
    """Of all that trains in one adapter: with the whole Hessian, and gradients of a vector."""
    model, params = adapters(width=1, placement="pfeiffer", targets="layers_1/mlp/down")
    everything = trained_of(params)
    vector, back, _ = flat(params, everything)
    total = lambda v: sum(loss_fn(model)(back(v), ids) for ids in BATCHES)
    slope, hessian = jax.jit(jax.grad(total))(vector), jax.jit(jax.hessian(total))(vector)
    flow = lambda v: jnp.mean(adapter(back(v), jnp.ones((1, 16))))
    scores = {
        "magnitude": jnp.abs(vector),
        "snip": jnp.abs(vector * slope),
        "grasp": vector * (hessian @ slope),
        "synflow": jnp.abs(vector) * jax.grad(flow)(jnp.abs(vector)),
    }
    matrices = np.concatenate([np.full(x.size, name.endswith(MATRICES)) for name, x in sorted(everything.items())])
    for score, wanted in scores.items():
        how = {"loss_fn": loss_fn(model), "batches": BATCHES} if score in ("snip", "grasp") else {}
        _, mask = jpeft.sparse_adapter(params, density=0.25, score=score, **how)
        found = np.concatenate([np.broadcast_to(mask[n], x.shape).ravel() for n, x in sorted(everything.items())])
        order = np.argsort(np.where(matrices, wanted, -np.inf))[-8:]
        assert set(np.flatnonzero(found & matrices)) == set(order.tolist()), score


def adapter(params, h):
    own = params["layers_1"]["mlp"]["down"]["bottleneck"]
    return jax.nn.relu(h @ own.down + own.down_bias[None]) @ own.up + own.up_bias[None]


def test_synflow_of_scanned_layers_and_of_a_function():
    """It is the same for layers one by one, and for a function of one's own that says the same."""
    _, params = adapters(placement="pfeiffer", targets=r"layers_\d/mlp/down")
    unrolled = jpeft.sparse_adapter(params, score="synflow", density=0.3)[1]
    ones = lambda params, x: sum(
        jnp.mean(params[f"layers_{n}"]["mlp"]["down"]["bottleneck"].change(x, None)) for n in range(2)
    )
    own = jpeft.sparse_adapter(params, score="synflow", density=0.3, loss_fn=ones, batches=[jnp.ones((1, 16))])[1]
    for name, x in unrolled.items():
        np.testing.assert_array_equal(x, own[name])
    _, stacked = adapters(scan=True, placement="pfeiffer")
    layers = [params[f"layers_{n}"]["mlp"]["down"]["bottleneck"] for n in range(2)]
    stacked["layers"]["mlp"]["down"]["bottleneck"] = jax.tree.map(lambda *xs: jnp.stack(xs), *layers)
    found = jpeft.sparse_adapter(stacked, score="synflow", density=0.3)[1]
    for name in MATRICES:
        want = np.stack([unrolled[f"layers_{n}/mlp/down/bottleneck/{name}"] for n in range(2)])
        np.testing.assert_array_equal(found[f"layers/mlp/down/bottleneck/{name}"], want)


def test_zeros_stay_while_it_trains():
    """Under AdamW with weight decay; and with a density of one, it is the adapter as it was."""
    model, params = adapters()
    for density in (0.5, 1.0):
        pruned, mask = jpeft.sparse_adapter(params, density=density)
        trainable, frozen = jpeft.partition(pruned)
        tx = masked_updates(optax.adamw(1e-2, weight_decay=0.1), mask)
        plain = optax.adamw(1e-2, weight_decay=0.1)
        state, dense, dense_state = tx.init(trainable), trainable, plain.init(trainable)
        for _ in range(3):
            updates, state = tx.update(model.slope(trainable, frozen)[1], state, trainable)
            trainable = optax.apply_updates(trainable, updates)
            with jax.numpy_dtype_promotion("standard"):
                updates, dense_state = plain.update(model.slope(dense, frozen)[1], dense_state, dense)
            dense = optax.apply_updates(dense, updates)
        after, without = trained_of(trainable), trained_of(dense)
        assert nonzero(trainable) == int(density * 8 * 16 * 4)
        for name, x in trained_of(params).items():
            np.testing.assert_array_equal(after[name] == 0, ~np.broadcast_to(mask[name], x.shape))
        if density == 1:
            np.testing.assert_array_equal(*(np.concatenate([x.ravel() for x in t.values()]) for t in (after, without)))
        else:
            assert nonzero(dense) == 8 * 16 * 4


def test_large_sparse_has_the_budget_of_the_dense():
    """Four times as wide, of a density of a quarter."""
    pruned, _ = jpeft.sparse_adapter(adapters(width=12)[1], density=1 / 4)
    assert nonzero(pruned) == nonzero(adapters(width=3)[1])


def test_adapters_of_other_methods():
    """The factors of LoRA; one of them starts at zero."""
    model = subject("decoder")
    params = jpeft.lora(model.params, rank=2)
    with pytest.raises(ValueError, match=r"scores by magnitude are zero(.*\n)*.*layers_1/mlp/up/kernel/b"):
        jpeft.sparse_adapter(params)
    pruned, mask = jpeft.sparse_adapter(params, targets=".*/a", density=0.5)
    kept = [np.count_nonzero(x) for name, x in trained_of(pruned).items() if name.endswith("/a")]
    assert sum(kept) == sum(x.size for name, x in trained_of(params).items() if name.endswith("/a")) // 2
    assert mask["layers_0/attention/query/kernel/b"] is np.True_
    _, mask = jpeft.sparse_adapter(params, score="random", density=0.5)
    assert sum(np.sum(x) for x in mask.values()) == sum(x.size for x in mask.values()) // 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "fisher"}, "`score` is 'fisher'"),
        ({"score": "snip"}, "give `loss_fn"),
        ({"score": "grasp", "loss_fn": lambda params, batch: 0.0}, "and `batches`"),
        ({"density": 0.0}, r"in \(0, 1\]"),
        ({"targets": ".*/dwon"}, "'.*/dwon' matches no"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.sparse_adapter(adapters()[1], **options)


def test_a_zero_start_tells_nothing():
    """Neither of magnitudes nor of gradients, which are zero where the other matrix is."""
    model = subject("decoder")
    params = jpeft.bottleneck(model.params, width=2)
    for score in ("magnitude", "snip", "grasp", "synflow"):
        how = {"loss_fn": loss_fn(model), "batches": BATCHES} if score in ("snip", "grasp") else {}
        with pytest.raises(ValueError, match=rf"by {score} are zero(.*\n)*.*layers_1/mlp/down/bottleneck/up \(2, 16\)"):
            jpeft.sparse_adapter(params, score=score, **how)
