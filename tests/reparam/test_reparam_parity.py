"""Every method against Hugging Face's PEFT on a torch layer: outputs, merged weights, and gradients of every array."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft


ARRAYS = dict(np.load(Path(__file__).parents[1] / "fixtures" / "reparam" / "peft.npz"))
WINDOW = (3, 2)


def turned(x):
    """A torch array `(out, in, *window)` as a matrix `(window in, out)`."""
    return np.transpose(x, (*range(2, x.ndim), 1, 0)).reshape(-1, x.shape[0])


def flat(x):
    """The same of one whose window is flat, and the fastest axis: `(out, in window)`."""
    return turned(x.reshape(x.shape[0], -1, *WINDOW))


def core(x):
    """A core `(rank, rank, *window)` as `(window, rank, rank)`."""
    return np.transpose(x, (2, 3, 1, 0)).reshape(-1, *x.shape[:2])


def same(x):
    return x


LOW_RANK = {"a": ("lora_A.weight", turned), "b": ("lora_B.weight", turned)}
MAGNITUDE = {"magnitude": ("lora_magnitude_vector.weight", np.ravel)}
TABLE = {"a": ("lora_embedding_A", turned), "b": ("lora_embedding_B", turned)}
HADAMARD = {"b1": ("hada_w1_a", turned), "b2": ("hada_w2_a", turned)}
# of every case the transform, its options, and where each field of the node is in PEFT's file
CASES = {
    "dora": (jpeft.dora, {"rank": 3, "alpha": 6}, LOW_RANK | MAGNITUDE),
    "dora_conv": (jpeft.dora, {"rank": 3, "alpha": 2}, LOW_RANK | MAGNITUDE),
    "dora_table": (jpeft.dora, {"rank": 2, "alpha": 4}, TABLE | MAGNITUDE),
    "pissa": (jpeft.pissa, {"rank": 3, "alpha": 6}, LOW_RANK),
    "olora": (jpeft.olora, {"rank": 3, "alpha": 6}, LOW_RANK),
    "adalora": (
        jpeft.adalora,
        {"rank": 4, "alpha": 40},
        {"a": ("lora_A", turned), "b": ("lora_B", turned), "e": ("lora_E", np.ravel)},
    ),
    "vera": (jpeft.vera, {"rank": 5}, {"d": ("vera_lambda_d", same), "b": ("vera_lambda_b", same)}),
    "hira": (jpeft.hira, {"rank": 3}, {"a": ("hira_A", turned), "b": ("hira_B", turned)}),
    "hira_conv": (jpeft.hira, {"rank": 3}, {"a": ("hira_A", turned), "b": ("hira_B", turned)}),
    "hira_table": (jpeft.hira, {"rank": 2}, {"a": ("hira_embedding_A", turned), "b": ("hira_embedding_B", turned)}),
    "loha": (
        jpeft.loha,
        {"rank": 3, "alpha": 6},
        HADAMARD | {"a1": ("hada_w1_b", turned), "a2": ("hada_w2_b", turned)},
    ),
    "loha_conv": (
        jpeft.loha,
        {"rank": 3, "alpha": 2},
        HADAMARD | {"a1": ("hada_w1_b", flat), "a2": ("hada_w2_b", flat)},
    ),
    "loha_effective": (
        jpeft.loha,
        {"rank": 3, "alpha": 2, "effective_conv": True},
        {
            **{"a1": ("hada_w1_b", turned), "b1": ("hada_w1_a", same), "t1": ("hada_t1", core)},
            **{"a2": ("hada_w2_b", turned), "b2": ("hada_w2_a", same), "t2": ("hada_t2", core)},
        },
    ),
    "lokr": (
        jpeft.lokr,
        {"rank": 1, "alpha": 2},
        {"w1": ("lokr_w1", turned), "w2": [("lokr_w2_b", turned), ("lokr_w2_a", turned)]},
    ),
    "lokr_full": (
        jpeft.lokr,
        {"rank": 8, "alpha": 4},
        {"w1": ("lokr_w1", turned), "w2": ("lokr_w2", turned)},
    ),
    "lokr_both": (
        jpeft.lokr,
        {"rank": 1, "alpha": 3, "decompose_both": True, "decompose_factor": 4},
        {
            "w1": [("lokr_w1_b", turned), ("lokr_w1_a", turned)],
            "w2": [("lokr_w2_b", turned), ("lokr_w2_a", turned)],
        },
    ),
    "lokr_conv": (
        jpeft.lokr,
        {"rank": 8, "alpha": 4},
        {"w1": ("lokr_w1", turned), "w2": ("lokr_w2", turned)},
    ),
    "lokr_conv_low": (
        jpeft.lokr,
        {"rank": 1, "alpha": 4},
        {"w1": ("lokr_w1", turned), "w2": [("lokr_w2_b", flat), ("lokr_w2_a", turned)]},
    ),
    "lokr_effective": (
        jpeft.lokr,
        {"rank": 1, "alpha": 2, "effective_conv": True},
        {"w1": ("lokr_w1", turned), "w2": [("lokr_w2_b", turned), ("lokr_w2_a", same), ("lokr_t2", core)]},
    ),
}


def fields(arrays, kind, places):
    """The node's fields, from PEFT's arrays of a kind: `adapter`, `gradient` or `start`."""
    one = lambda place: jnp.asarray(place[1](arrays[f"{kind}/{place[0]}"]))
    return {name: tuple(map(one, at)) if isinstance(at, list) else one(at) for name, at in places.items()}


@pytest.fixture(params=CASES, scope="module")
def case(request):
    """A model, its parameters with PEFT's arrays in the node, input, output, and PEFT's gradients by field."""
    transform, options, places = CASES[request.param]
    arrays = {key.partition("/")[2]: x for key, x in ARRAYS.items() if key.startswith(f"{request.param}/")}
    x, y, weight = (jnp.asarray(arrays[name]) for name in ("x", "y", "base/weight"))
    name, model, params = "kernel", nn.Dense(8), {"kernel": jnp.asarray(turned(weight))}
    if x.ndim == 4:
        x, y = jnp.moveaxis(x, 1, -1), jnp.moveaxis(y, 1, -1)
        model = nn.Conv(6, WINDOW, strides=(2, 1), padding=((1, 1), (0, 0)))
        params["kernel"] = jnp.transpose(weight, (2, 3, 1, 0))
    elif x.ndim == 2:
        name, model, params = "embedding", nn.Embed(11, 6), {"embedding": weight}
    if "base/bias" in arrays:
        params["bias"] = jnp.asarray(arrays["base/bias"])
    params = transform(params, targets=name, sites=jpeft.sites(model, {"params": params}, x), **options)
    found = fields(arrays, "adapter", places)
    assert jax.tree.map(jnp.shape, {n: getattr(params[name], n) for n in found}) == jax.tree.map(jnp.shape, found)
    if "start/lora_A.weight" in arrays:  # of these the product is settled, but not the sign of each factor
        start = fields(arrays, "start", places)
        node = params[name]
        np.testing.assert_allclose(node.start_a @ node.start_b, start["a"] @ start["b"], atol=1e-5)
        found |= {"start_a": start["a"], "start_b": start["b"]}
    if "adapter/vera_A" in arrays:
        params["jpeft_shared"] = {n: jnp.asarray(turned(arrays[f"adapter/{n}"])) for n in ("vera_A", "vera_B")}
        found |= {"project_a": jpeft.Ref("vera_A"), "project_b": jpeft.Ref("vera_B")}
    params[name] = params[name].replace(**found)
    return model, params, x, y, params[name], fields(arrays, "gradient", places)


def test_outputs(case):
    model, params, x, y, *_ = case
    np.testing.assert_allclose(jpeft.apply(model, {"params": params}, x), y, rtol=1e-5, atol=1e-5)


def test_merged_weights(case):
    model, params, x, y, *_ = case
    np.testing.assert_allclose(model.apply({"params": jpeft.merge(params)}, x), y, rtol=1e-5, atol=2e-5)


def test_gradients(case):
    model, params, x, _, node, want = case
    trainable, frozen = jpeft.partition(params)

    def loss(trainable):
        return jnp.sum(jpeft.apply(model, {"params": jpeft.combine(trainable, frozen)}, x) ** 2) / 2

    (gradient,) = (
        g for g in jax.tree.leaves(jax.jit(jax.grad(loss))(trainable), is_leaf=lambda g: isinstance(g, type(node)))
    )
    for name, expected in want.items():
        for found, exact in zip(jax.tree.leaves(getattr(gradient, name)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max(), err_msg=name)
