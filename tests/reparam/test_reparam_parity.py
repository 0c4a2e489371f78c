"""Every method against Hugging Face's PEFT on a torch layer: outputs, merged weights, and gradients of every array."""

import jax.numpy as jnp
import numpy as np
import pytest
from peft_layers import adapted, check_gradients, check_merged, check_outputs, core, fields, flat, of_case, same, turned

import jpeft


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


@pytest.fixture(params=CASES, scope="module")
def case(request):
    """A model, its parameters with PEFT's arrays in the node, the node's name, input, output, and PEFT's gradients."""
    transform, options, places = CASES[request.param]
    arrays = of_case("reparam/peft.npz", request.param)
    model, params, name, x, y = adapted(arrays, transform, options, places)
    if "start/lora_A.weight" in arrays:  # of these the product is settled, but not the sign of each factor
        start, node = fields(arrays, "start", places), params[name]
        begun = transform({name: node.base}, targets=name, **options)[name]
        np.testing.assert_allclose(begun.start_a @ begun.start_b, start["a"] @ start["b"], atol=1e-5)
        params[name] = node.replace(start_a=start["a"], start_b=start["b"])
    if "adapter/vera_A" in arrays:
        params["jpeft_shared"] = {n: jnp.asarray(turned(arrays[f"adapter/{n}"])) for n in ("vera_A", "vera_B")}
        params[name] = params[name].replace(project_a=jpeft.Ref("vera_A"), project_b=jpeft.Ref("vera_B"))
    return model, params, name, x, y, fields(arrays, "gradient", places)


def test_outputs(case):
    model, params, _, x, y, _ = case
    check_outputs(model, params, x, y)


def test_merged_weights(case):
    model, params, _, x, y, _ = case
    check_merged(model, params, x, y)


def test_gradients(case):
    model, params, name, x, _, want = case
    check_gradients(model, params, name, x, want)
