"""What kernels are multiplied with, against the activations themselves: unrolled, scanned, rematerialized, routed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

import jpeft
import jpeft.testing as laws
from jpeft.offline._probe import new_probe


PARAMS = {"up": {"kernel": normal(0, 6, 5)}, "down": {"kernel": normal(1, 5, 3)}}
X = normal(2, 7, 4, 6) + 1
BATCHES = [{"x": X[:3], "mask": jnp.ones((3, 4))}, {"x": X[3:], "mask": jnp.ones((4, 4)).at[1, 2:].set(0)}]


def mlp(params, x):
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


def forward(params, batch):
    return jpeft.apply(mlp, params, batch["x"])


def close(found, expected, tolerance=1e-5):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def check(found, rows, tolerance=1e-5):
    """All sums are those of the rows, `(..., rows, in)`."""
    rows = np.asarray(rows, np.float64)
    close(found.covariance, np.swapaxes(rows, -1, -2) @ rows, tolerance)
    close(found.total, rows.sum(-2), tolerance)
    close(found.energy, (rows**2).sum((-1, -2)), tolerance)
    np.testing.assert_array_equal(found.count, np.full(rows.shape[:-2], rows.shape[-2]))


def rows_of(x, mask=None):
    rows = np.asarray(x).reshape(-1, x.shape[-1])
    return rows if mask is None else rows[np.asarray(mask).ravel() > 0]


@pytest.mark.parametrize("masked", [False, True])
def test_sums_over_batches(masked):
    """Of ragged batches; `None` where there is no target; with positions left out."""
    how = {"mask": lambda batch: batch["mask"]} if masked else {}
    found = jpeft.capture_inputs(forward, PARAMS, BATCHES, **how)
    mask = jnp.concatenate([b["mask"] for b in BATCHES]) if masked else None
    check(found["up"]["kernel"], rows_of(X, mask))
    check(found["down"]["kernel"], rows_of(jnp.tanh(X @ PARAMS["up"]["kernel"]), mask))
    only = jpeft.capture_inputs(forward, PARAMS, BATCHES, targets="down/kernel")
    assert only["up"] == {"kernel": None} and only["down"]["kernel"].axes == "io"


def decoder(params, batch):
    return jpeft.apply(laws.subject("decoder", scan=True).model, {"params": params}, *batch)


def test_scanned_layers():
    """Of every layer of a scanned decoder what the unrolled one has, whose inputs are recorded as it runs."""
    subject = laws.subject("decoder", scan=True)
    found = jpeft.capture_inputs(decoder, subject.params, [subject.args], sites=subject.sites)
    plain = subject.model.clone(scan=False)
    params = {k: x for k, x in subject.params.items() if k != "layers"}
    params |= {f"layers_{n}": jax.tree.map(lambda x, n=n: x[n], subject.params["layers"]) for n in range(laws.LAYERS)}
    seen = {}

    def record(call, args, kwargs, context):
        if isinstance(context.module, nn.Dense | nn.DenseGeneral):
            seen["/".join(context.module.path)] = args[0]
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        plain.apply({"params": params}, *subject.args)
    for site in ("attention/query", "attention/out", "mlp/down"):
        block, name = site.split("/")
        inputs = found["layers"][block][name]["kernel"]
        size = inputs.product.shape[-1]
        check(inputs, np.stack([seen[f"layers_{n}/{site}"].reshape(-1, size) for n in range(laws.LAYERS)]), 1e-4)
    assert found["lm_head"]["kernel"] is None


def routed(params, batch):
    x, groups = batch
    return jpeft.apply(lambda p, x: jax.lax.ragged_dot(x, p["w"], groups), params, x)


def test_experts():
    """Each expert has its own rows, one of them none; and the same of experts that are multiplied as a stack."""
    x, groups = normal(3, 9, 4), jnp.array([2, 0, 7])
    found = jpeft.capture_inputs(routed, {"w": normal(4, 3, 4, 5)}, [(x, groups)], targets={"w": "sio"})["w"]
    np.testing.assert_array_equal(found.count, groups)
    for n, part in enumerate(np.split(x, [2, 2])):
        np.testing.assert_allclose(found.covariance[n], part.T @ part, atol=1e-5)
        np.testing.assert_allclose(found.total[n], part.sum(0), atol=1e-5)
    stack = lambda p, x: jpeft.apply(lambda p, x: jnp.einsum("enx,exy->eny", x, p["w"]), p, x)
    x = normal(5, 3, 6, 4)
    check(jpeft.capture_inputs(stack, {"w": normal(4, 3, 4, 5)}, [x], targets={"w": "sio"})["w"], x)


def test_kernels_used_twice_and_in_rematerialized_code():
    def twice(p, x):
        step = jax.checkpoint(lambda x: jnp.tanh(x @ p["w"]))
        return step(step(x))

    w, x = normal(6, 4, 4), normal(7, 5, 4)
    found = jpeft.capture_inputs(lambda p, x: jpeft.apply(twice, p, x), {"w": w}, [x], targets="w")["w"]
    check(found, jnp.concatenate([x, jnp.tanh(x @ w)]))


def test_under_other_nodes_and_in_half_precision():
    """The sums are as exact as the inputs, whatever the model computes in, on codes and beneath adapters."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    tuned = jpeft.chain(jpeft.int8(), jpeft.lora(rank=2))(half)
    rows = X.astype(jnp.bfloat16)
    found = jpeft.capture_inputs(forward, tuned, [{"x": rows}])
    check(found["up"]["kernel"], rows_of(rows.astype(jnp.float32)))
    assert found["down"]["kernel"].covariance.dtype == jnp.float32


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("sketch", [None, 3, 5])
def test_principal_directions(sketch, centered):
    """The right-singular vectors of the rows; of a sketch too, where their rank is no higher."""
    x = normal(8, 20, 3) @ normal(9, 3, 6)
    x = x if sketch == 3 and not centered else x + normal(10, 6)[None]
    if sketch == 3 and centered:
        x = x - x.mean(0, keepdims=True)
    run = lambda p, x: jpeft.apply(lambda p, x: x @ p["w"], p, x)
    found = jpeft.capture_inputs(run, {"w": normal(0, 6, 2)}, [x[:9], x[9:]], targets="w", sketch=sketch)["w"]
    rows = x - x.mean(0, keepdims=True) if centered else x
    _, s, v = np.linalg.svd(rows, full_matrices=False)
    values, vectors = found.principal(3, centered=centered)
    np.testing.assert_allclose(values, s[:3] ** 2, rtol=1e-3)
    close(vectors @ vectors.T, v[:3].T @ v[:3], 1e-3)
    close(vectors.T @ vectors, np.eye(3))
    np.testing.assert_allclose(found.variance(centered=centered), (s**2).sum(), rtol=1e-4)


def test_a_sketch_finds_what_dominates():
    x = normal(11, 400, 64) * (0.8 ** jnp.arange(64.0))[None]
    run = lambda p, x: jpeft.apply(lambda p, x: x @ p["w"], p, x)
    found = jpeft.capture_inputs(run, {"w": normal(0, 64, 2)}, [x], targets="w", sketch=24)["w"]
    assert found.product.shape == (64, 24)
    v = np.linalg.svd(x, full_matrices=False)[2][:8]
    angles = np.linalg.svd(v @ np.asarray(found.principal(8)[1]), compute_uv=False)
    assert angles.min() > 0.99
    with pytest.raises(ValueError, match=r"only a sketch of \(64, 24\) was kept"):
        _ = found.covariance


def test_interrupted(tmp_path):
    """What sums are kept is what sums would have been."""
    broken = (BATCHES[0] if n == 0 else 1 / 0 for n in range(2))
    with pytest.raises(ZeroDivisionError):
        jpeft.capture_inputs(forward, PARAMS, broken, resume=tmp_path / "p", save_every=1)
    jax.tree.map(
        np.testing.assert_array_equal,
        jpeft.capture_inputs(forward, PARAMS, BATCHES, resume=tmp_path / "p"),
        jpeft.capture_inputs(forward, PARAMS, BATCHES),
    )


def test_refuses_inputs_that_are_not_seen():
    """Behind a stopped gradient, and in a model that is called past `apply`."""
    stopped = lambda p, b: jpeft.apply(lambda p, x: mlp(p, x) + 0 * jax.lax.stop_gradient(mlp(p, x)), p, b["x"])
    jpeft.capture_inputs(stopped, PARAMS, BATCHES[:1])
    with pytest.raises(ValueError, match="No inputs of these kernels were seen: down/kernel, up/kernel"):
        jpeft.capture_inputs(lambda p, b: jax.lax.stop_gradient(forward(p, b)), PARAMS, BATCHES[:1])


@pytest.mark.parametrize(
    ("run", "params", "batch", "message"),
    [
        (forward, PARAMS, BATCHES[0] | {"mask": jnp.ones((3, 5))}, r"mask is \(3, 5\), .*'up/kernel' are \(3, 4\)"),
        (forward, PARAMS, BATCHES[0] | {"mask": jnp.ones((4, 3))}, r"mask is \(4, 3\), .*'up/kernel' are \(3, 4\)"),
        (
            lambda p, b: routed({"w": p["w"]["kernel"]}, (b["x"], jnp.array([1, 2]))),
            {"w": {"kernel": normal(4, 2, 4, 5)}},
            {"x": normal(3, 3, 4), "mask": jnp.ones(3)},
            "'w/kernel' are sorted by expert",
        ),
    ],
)
def test_refuses_masks_that_do_not_fit(run, params, batch, message):
    targets = {".*/kernel": "sio"} if "w" in params else None
    with pytest.raises(ValueError, match=message):
        jpeft.capture_inputs(run, params, [batch], mask=lambda b: b["mask"], targets=targets)


@pytest.mark.parametrize("trips", [1, 4])
def test_no_gradient_of_the_model_is_computed(trips):
    """In the gradient, beside a forward pass, only what the probes ask for is left by XLA: scanned, and unrolled."""
    layers, size, rows = 4, 64, 256
    fn = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"], unroll=layers // trips)[0]
    params, x = {"w": normal(0, layers, size, size)}, normal(1, rows, size)
    flops = lambda fn, *args: jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]
    probed = jpeft.wrap(params, new_probe, targets={"w": "sio"}, sketch=None, path="w")["w"]
    loss = lambda moment, probed, x: jnp.sum(jpeft.apply(fn, {"w": probed.replace(moment=moment)}, x))
    products = layers // trips * 2 * rows * (size + 1) * (size + 2)  # of one trip, as XLA counts them
    found = flops(jax.grad(loss), probed.moment, probed, x)
    assert products < found < 1.1 * (flops(fn, params, x) + products)
    assert flops(jax.grad(lambda p, x: jnp.sum(fn(p, x))), params, x) > 1.3 * found
