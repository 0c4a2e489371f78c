"""P-tuning, MPT and CPT in a whole model, beside PEFT: logits, losses, gradients, and CPT's steps."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft import hf


FIXTURES = Path(__file__).parents[1] / "fixtures"
ARRAYS = dict(np.load(FIXTURES / "prompts" / "llama.npz"))
MASK = jnp.asarray(ARRAYS["mask"])


def close(found, want, tolerance):
    np.testing.assert_allclose(found, want, rtol=0, atol=tolerance * np.abs(want).max())


def part(case, kind):
    start = f"{case}/{kind}/"
    return {name.removeprefix(start): jnp.asarray(x) for name, x in ARRAYS.items() if name.startswith(start)}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The model, its parameters and token ids."""
    safetensors = pytest.importorskip("safetensors")
    from safetensors.numpy import save_file

    path = FIXTURES / "adapters" / "llama.safetensors"
    with safetensors.safe_open(path, "numpy") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in list(file.keys())}, file.metadata()
    directory = tmp_path_factory.mktemp("llama")
    own = {n: x for n, x in tensors.items() if n not in ("logits", "targets") and not n.startswith("inputs/")}
    save_file(own, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(metadata["config"])
    model, params, _ = hf.load(directory)
    return model, params, jnp.asarray(tensors["inputs/input_ids"], jnp.int32)


def ptuning_fields(own, gradients):
    """PEFT's tensors, or their gradients, as the fields of `PTuning`."""
    linear = lambda n: (own[f"mlp_head.{n}.weight"].T, own[f"mlp_head.{n}.bias"])

    def direction(end):
        bias = own[f"lstm_head.bias_ih_{end}"]  # PEFT has two, which are summed; their gradients are the same
        bias = bias if gradients else bias + own[f"lstm_head.bias_hh_{end}"]
        return own[f"lstm_head.weight_ih_{end}"].T, own[f"lstm_head.weight_hh_{end}"].T, bias

    layers = [end for end in ("l0", "l1") if f"lstm_head.weight_ih_{end}" in own]
    return {
        "rows": own["embedding.weight"],
        "mlp": tuple(linear(n) for n in (0, 2, 4) if f"mlp_head.{n}.weight" in own),
        "lstm": tuple((direction(end), direction(f"{end}_reverse")) for end in layers),
    }


def mpt_fields(own, gradients):
    return {"rows": own["embedding.weight"], "u": own["prefix_task_cols"], "v": own["prefix_task_rows"]}


CASES = {
    "ptuning_mlp": (jpeft.ptuning(length=4, width=5), ptuning_fields, {}),
    "ptuning_lstm": (jpeft.ptuning(length=4, width=5, encoder="lstm"), ptuning_fields, {}),
    "mpt": (jpeft.mpt(length=4, tasks=3, rank=2), mpt_fields, {"task_ids": jnp.asarray(ARRAYS["tasks"])}),
}


def with_fields(params, fields):
    node = params["embed"]["prompt"].replace(**fields)
    return params | {"embed": params["embed"] | {"prompt": node}}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case, llama):
    model, params, ids = llama
    method, fields, options = CASES[case]
    tuned = method(params)

    def loss(own):
        y = jpeft.apply(model, {"params": with_fields(tuned, own)}, ids, MASK, **options)
        return jnp.mean(jnp.square(y)) / 2, y

    own = fields(part(case, "p"), False)
    assert jax.tree.structure(own) == jax.tree.structure(fields(part(case, "g"), True))
    grads, y = jax.jit(jax.grad(loss, has_aux=True))(own)
    kept = np.asarray(MASK, np.float32)[:, :, None]
    close(y * kept, ARRAYS[f"{case}/logits"] * kept, 1e-5)
    want = fields(part(case, "g"), True)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(want))
    for g, w in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4 * largest)
    node = params_node(method(params))
    assert all(x.shape == getattr(node, name).shape for name, x in own.items() if hasattr(x, "shape"))


def params_node(params):
    return params["embed"]["prompt"]


TYPES = ARRAYS["cpt_tokens_type_mask"]
MOVES = TYPES % 4 != 0


def cpt(params, delta):
    ids = ARRAYS["cpt_token_ids"].tolist()
    tuned = jpeft.cpt(params, ids=ids, types=TYPES.tolist(), epsilon=25.0, format_epsilon=20.0)
    return with_fields(tuned, {"delta": jnp.asarray(delta)[MOVES]})


@pytest.mark.parametrize(("case", "decay"), [("cpt", 1.0), ("cpt_decay", 0.5)])
def test_cpt(case, decay, llama):
    """Its loss weighs the examples' labels; a step that is cut to the bounds is PEFT's, and labels do not move."""
    model, params, ids = llama
    own = {name.removeprefix(f"{case}/"): x for name, x in ARRAYS.items() if name.startswith(f"{case}/")}
    given = cpt(params, own["given"])
    cut = params_node(given).bounded().delta
    close(cut, own["p/delta_embedding.weight"][MOVES], 1e-6)
    assert np.any(cut != params_node(given).delta) and np.any(np.all(cut == params_node(given).delta, axis=1))
    tuned = cpt(params, own["p/delta_embedding.weight"])
    trainable, frozen = jpeft.partition(tuned)

    def loss(trainable):
        params = jpeft.combine(trainable, frozen)
        logits = jpeft.apply(model, {"params": params}, ids, MASK, keep_prompt=True)
        return jpeft.cpt_loss(params, logits, jnp.asarray(own["labels"]), decay=decay), logits

    (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable)
    kept = np.concatenate([np.ones((2, len(TYPES))), MASK], axis=1)[:, :, None]
    close(logits * kept, own["logits"] * kept, 1e-5)
    np.testing.assert_allclose(value, own["loss"], rtol=1e-5)
    close(params_node(grads).delta, own["g/delta_embedding.weight"][MOVES], 1e-4)
    assert not own["g/delta_embedding.weight"][~MOVES].any()

    tx = optax.chain(optax.sgd(own["rate"].item()), jpeft.optim.keep_bounded())
    updates, _ = tx.update(grads, tx.init(trainable), trainable)
    moved = params_node(optax.apply_updates(trainable, updates)).delta
    close(moved, own["after"][MOVES], 1e-4)
    assert np.abs(moved - params_node(trainable).delta).max() > 0.01


def test_decay_changes_the_loss():
    assert abs(ARRAYS["cpt/loss"] - ARRAYS["cpt_decay/loss"]) > 0.1
