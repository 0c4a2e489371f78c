"""The smaller relatives of LoRA against Hugging Face's PEFT on a torch layer: outputs, merged weights, gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_layers import adapted, check_gradients, check_merged, check_outputs, fields, of_case, same, turned

import jpeft


def across(x):
    return np.swapaxes(x, -1, -2)


def paired(b):
    """RandLoRA's B `(wide, terms, rank)` by term: PEFT lists it by term and rank, and A's rows by rank and term."""
    return b.reshape(b.shape[0], b.shape[2], b.shape[1]).transpose(2, 0, 1)


@dataclasses.dataclass(frozen=True)
class Case:
    """A transform, its options, and where fields that train, others and shared arrays are among PEFT's."""

    transform: object
    options: dict
    trained: dict
    kept: dict = dataclasses.field(default_factory=dict)
    shared: dict = dataclasses.field(default_factory=dict)


GRANULAR = {"a": ("gralora_A", same), "b": ("gralora_B", same)}
WHOLE = {"whole_a": ("gralora_A_general.weight", turned), "whole_b": ("gralora_B_general.weight", turned)}
SUM = {"inner": ("randlora_lambda", turned), "outer": ("randlora_gamma", same)}
BASES = {"randlora_narrow": ("randlora_A", lambda a: a[:, 0]), "randlora_wide": ("randlora_B", paired)}
TINY = {"v": ("tinylora_v.0", same)}
CASES = {
    "delora": Case(
        jpeft.delora,
        {"rank": 3},
        {"a": ("delora_A", turned), "b": ("delora_B", turned), "bound": ("delora_lambda", np.squeeze)},
        {"norms": ("delora_w_norm", same)},
    ),
    "gralora": Case(jpeft.gralora, {"rank": 4, "alpha": 8}, GRANULAR),
    "gralora_hybrid": Case(jpeft.gralora, {"rank": 8, "alpha": 5, "blocks": 4, "hybrid": 2}, GRANULAR | WHOLE),
    "randlora": Case(jpeft.randlora, {"rank": 3, "alpha": 6}, SUM, shared=BASES),
    "randlora_tall": Case(jpeft.randlora, {"rank": 4, "alpha": 6}, SUM, shared=BASES),
    "randlora_sparse": Case(jpeft.randlora, {"rank": 3, "alpha": 3, "sparsity": 3}, SUM, shared=BASES),
    "tinylora": Case(
        jpeft.tinylora,
        {"rank": 3, "length": 5},
        TINY,
        {"a": ("tinylora_A", turned), "b": ("tinylora_B", turned), "p": ("tinylora_P", across)},
    ),
    "tinylora_table": Case(
        jpeft.tinylora,
        {"rank": 2, "length": 7},
        TINY,
        {"a": ("tinylora_B", same), "b": ("tinylora_A", same), "p": ("tinylora_P", same)},
    ),
    "vblora": Case(
        jpeft.vblora,
        {"rank": 3, "vectors": 7, "length": 4, "top": 3},
        {"logits_a": ("vblora_logits_A", same), "logits_b": ("vblora_logits_B", lambda x: np.swapaxes(x, 0, 1))},
        shared={"vblora_bank": ("vblora_vector_bank", same)},
    ),
}


def of_peft(name):
    """A case, PEFT's arrays, and the model with them in the node: model, parameters, the node's name, input, output."""
    case, arrays = CASES[name], of_case("low_rank/peft.npz", name)
    model, params, *rest = adapted(arrays, case.transform, case.options, case.trained | case.kept)
    if case.shared:
        held, treedef = jax.tree.flatten(params["jpeft_shared"])
        found = fields(arrays, "adapter", case.shared)
        assert [x.shape for x in held] == [found[n].shape for n in sorted(found)]
        params["jpeft_shared"] = treedef.unflatten([found[n] for n in sorted(found)])
    return case, arrays, (model, params, *rest)


@pytest.fixture(params=CASES, scope="module")
def found(request):
    return of_peft(request.param)


def test_outputs(found):
    _, _, (model, params, _, x, y) = found
    check_outputs(model, params, x, y)


def test_merged_weights(found):
    _, _, (model, params, _, x, y) = found
    check_merged(model, params, x, y)


def test_gradients(found):
    case, arrays, (model, params, name, x, _) = found
    check_gradients(model, params, name, x, fields(arrays, "gradient", case.trained))


def test_what_is_kept_is_what_a_kernel_starts_with(found):
    """Singular vectors but for their signs, which are those of both factors, and norms."""
    case, _, (_, params, name, _, _) = found
    start = case.transform({name: params[name].base}, targets={name: "io"}, **case.options)[name]
    for field in {"norms", "a", "b"} & case.kept.keys():
        np.testing.assert_allclose(np.abs(getattr(start, field)), np.abs(getattr(params[name], field)), atol=1e-5)


def test_gradient_of_the_bank():
    case, arrays, (model, params, _, x, _) = of_peft("vblora")
    trainable, frozen = jpeft.partition(params)
    loss = lambda t: jnp.sum(jpeft.apply(model, {"params": jpeft.combine(t, frozen)}, x) ** 2) / 2
    gradient = jax.grad(loss)(trainable)["jpeft_shared"]["vblora_bank"].array
    want = fields(arrays, "gradient", case.shared)["vblora_bank"]
    np.testing.assert_allclose(gradient, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_terms_of_the_paper_are_not_those_of_peft():
    """RandLoRA's sum, as the paper has it, takes B by term: with PEFT's B as it lies it is another one."""
    _, arrays, (model, params, _, x, y) = of_peft("randlora")
    b = arrays["adapter/randlora_B"]
    params["jpeft_shared"] = params["jpeft_shared"] | {"randlora_wide": jnp.asarray(b.transpose(1, 0, 2))}
    assert np.abs(jpeft.apply(model, {"params": params}, x) - y).max() > 0.1


def test_choices_are_those_that_peft_writes():
    arrays = of_case("low_rank/peft.npz", "choices")
    params = jpeft.vblora({"w": jnp.ones((12, 8))}, rank=3, vectors=7, length=4, top=3, targets="w")
    b = jnp.asarray(arrays["logits_b"].swapaxes(0, 1))
    params["w"] = params["w"].replace(logits_a=jnp.asarray(arrays["logits_a"]), logits_b=b)
    node = jpeft.vblora_choices(params)["w"]
    for side, turn in (("a", same), ("b", lambda x: x.swapaxes(0, 1))):
        places, shares = (turn(arrays[f"vblora_logits_{side.upper()}_topk_{n}"]) for n in ("indices", "weights"))
        np.testing.assert_array_equal(getattr(node, f"choices_{side}"), places)
        assert getattr(node, f"choices_{side}").dtype == places.dtype
        np.testing.assert_allclose(getattr(node, f"shares_{side}"), shares, rtol=1e-6)


def test_dropout_of_dora_is_not_that_of_peft():
    """PEFT also drops inputs of the base's part that magnitudes add; the paper has dropout of the term alone."""
    own = of_case("low_rank/peft.npz", "dropped")
    a, b, w = own["a"].T, own["b"].T, own["weight"].T
    gain = own["magnitude"] / np.linalg.norm(w + 2 * a @ b, axis=0)
    kept, term = own["x"] @ w, 2 * own["dropped"] @ a @ b
    peft = kept + (gain - 1) * (own["dropped"] @ w) + gain * term + own["bias"]
    np.testing.assert_allclose(peft, own["y"], rtol=1e-4, atol=1e-4)

    node = jpeft.DoRA(base=w, a=a, b=b, magnitude=own["magnitude"], scale=2.0)
    ours = np.asarray(node.gain(w)) * (kept + np.asarray(node.branch(own["dropped"], None)))
    np.testing.assert_allclose(ours, gain * (kept + term), rtol=1e-4, atol=1e-4)
    assert np.abs(ours + own["bias"] - own["y"]).max() > 0.1
